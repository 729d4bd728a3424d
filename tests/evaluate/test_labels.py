"""A run of lmjax as a labeller: what it says is what the task says, in prepare's stage too."""

import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.config import build, build_and_resolve, call, from_dict
from lmjax.data.labelled_text import LabelledText, vocab_size
from lmjax.data.vocabulary import Bytes
from lmjax.engine.loop import train
from lmjax.engine.run import Run
from lmjax.errors import UserError
from lmjax.evaluate import labels
from lmjax.evaluate.labels import Classifier
from lmjax.models.bert import bert
from lmjax.models.classifier import classifier
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.classify import Classify, num_classes

pa = pytest.importorskip("pyarrow")

TEXTS = ["What a lovely film!", "x", "The meal was " + "awful and " * 20, "", "dull"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    data = call(LabelledText, path="made", vocabulary=call(Bytes), length=24)
    encoder = call(
        bert,
        num_layers=1,
        dim=16,
        num_heads=2,
        vocab_size=call(vocab_size, of=data),
        max_length=24,
        pooler=False,
    )
    model = call(classifier, encoder=encoder, num_outputs=call(num_classes, of=data))
    config = call(
        Run,
        task=call(Classify, model=model),
        optimizer=call(adamw, learning_rate=call(cosine, peak=1e-2, steps=2, warmup_steps=1)),
        data=data,
        steps=2,
        batch_size=8,
    )
    run, tree = build_and_resolve(config)
    folder = tmp_path_factory.mktemp("labels") / "run"
    train(run, folder, config=tree, devices=jax.devices()[:1], quiet=True)
    return str(folder)


@pytest.mark.slow
def test_labels_and_scores_are_the_tasks_own(workdir):
    """Each text alone, cut by hand, through the model of the checkpoint."""
    labeller = pickle.loads(pickle.dumps(Classifier(workdir=workdir, batch_size=2)))
    found, scores = labeller.predict(TEXTS)
    run = labels._load(workdir, 0)
    assert run.classes == labeller.classes == ("negative", "positive")
    for text, label, score in zip(TEXTS, found, scores, strict=True):
        if not text:
            assert (label, score) == (None, None)
            continue
        tokens = np.frombuffer(text.encode()[:24], np.uint8)[None].astype("i4")
        values = np.asarray(run.predict({"tokens": tokens, "segments": np.ones_like(tokens)}))[0]
        assert label == run.classes[values.argmax()]
        np.testing.assert_allclose(score, values.max(), rtol=1e-5)
    _, of_positive = Classifier(workdir=workdir, positive="positive").predict(TEXTS[:1])
    expected = scores[0] if found[0] == "positive" else 1 - scores[0]
    np.testing.assert_allclose(of_positive[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_prepare_labels_with_it(workdir):
    from lmjax.prepare.stages.label import Label
    from tests.prepare.stages import drive

    labeller = from_dict({**call(Classifier, workdir=workdir).to_dict()})
    stage = Label(name="sentiment", labellers={"lmjax": build(labeller)}, batch_size=3)
    records = drive.records(TEXTS)
    result = drive.check(records, stage(records))
    kept = result.kept
    expected, scores = Classifier(workdir=workdir).predict(TEXTS)
    real = [i for i, text in enumerate(TEXTS) if text]
    assert kept["label:sentiment"].to_pylist() == [expected[i] for i in real]
    np.testing.assert_allclose(kept["score:sentiment"].to_pylist(), [scores[i] for i in real])
    source = labels._load(workdir, 0).source
    assert set(kept["label_by:sentiment"].to_pylist()) == {f"lmjax {source}"}
    assert result.quarantined["reason"].to_pylist() == ["lmjax gave no label"]
    (manifest,) = [path for path in stage.files() if path.endswith("metadata")]
    assert source in Path(manifest).read_text()


@pytest.mark.slow
def test_a_class_that_the_run_has_not_is_refused(workdir):
    with pytest.raises(UserError, match=r"has the classes \['negative', 'positive'\]"):
        Classifier(workdir=workdir, positive="good").predict(["a"])


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        Classifier(workdir=str(tmp_path)).predict(["a"])
    with pytest.raises(UserError, match="at least 1 and 0"):
        Classifier(workdir=str(tmp_path), batch_size=0)
