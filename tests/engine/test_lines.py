"""Lines of JSON: what a kill tore is left out and replaced, what is damaged is told."""

import pytest

from lmjax.engine.curves import read_metrics
from lmjax.engine.goodput import read_launches
from lmjax.engine.incidents import read_incidents
from lmjax.engine.lines import append_line, read_lines
from lmjax.errors import UserError

DAMAGE = [b"\xff", b"5", b"[]", b"{}", b'{"step": "1"}', b"[" * 100_000, b"{", b""]


def test_a_torn_last_line_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    append_line(path, {"a": 4})
    assert read_lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


@pytest.mark.parametrize("bad", DAMAGE)
def test_damaged_lines(tmp_path, bad, caplog):
    """Of metrics they are left out, of goodput too, with a warning; of incidents none may be."""
    good = b'{"step": 2, "batch": 1, "policy": "skip", "left_out": []}'
    for name in ("metrics", "incidents", "goodput"):
        (tmp_path / f"{name}.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 2]
    with pytest.raises(UserError, match=r"line 2 of .* is damaged"):
        read_incidents(tmp_path)
    assert read_launches(tmp_path / "goodput.jsonl") == []
    assert "line 2 of" in caplog.text
