import random
import tempfile

import numpy as np
import pytest

from lmjax.errors import UserError
from lmjax.prepare.stages import words
from lmjax.prepare.stages.label import Label
from lmjax.prepare.stages.linear import Linear, fit
from tests.prepare.stages import drive, texts


def examples() -> tuple[list[str], list[str]]:
    """Pieces of plays, and the same with their sentences' words in another order."""
    pieces = texts.plays()[::3]
    turned = [" ".join(sorted(piece.split())) for piece in pieces]
    return [*pieces, *turned], ["play"] * len(pieces) + ["list"] * len(turned)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("linear") / "model.npz")
    given, labels = examples()
    loss = fit(given[::2], labels[::2], path=path, num_buckets=1 << 14, epochs=3)
    return path, loss


def test_learns_what_only_pairs_of_words_tell(trained):
    path, loss = trained
    given, labels = examples()
    found, scores = Linear(path=path).predict(given[1::2])
    right = [a == b for a, b in zip(found, labels[1::2], strict=True)]
    assert np.mean(right) > 0.97
    assert loss < 0.3
    assert all(0.5 <= score <= 1 for score in scores)


def test_equals_a_mean_over_features_one_by_one(trained):
    path, _ = trained
    held = np.load(path)
    given = [*texts.plays()[1:20:5], "", "one", "?"]
    labels, scores = Linear(path=path, positive="play").predict(given)
    for text, label, score in zip(given, labels, scores, strict=True):
        hashes = words.normal_words([text]).hashes_W
        bounds = np.array([0, len(hashes)])
        pairs, _ = words.ngrams(hashes, bounds, 2)
        ones, _ = words.ngrams(hashes, bounds, 1)
        vectors = [held["weights"][int(f) % (1 << 14)].astype(float) for f in [*ones, *pairs]]
        logits = np.mean(vectors, axis=0) + held["bias"] if vectors else held["bias"]
        chance = np.exp(logits) / np.exp(logits).sum()
        names = held["names"].tolist()
        assert label == names[int(chance.argmax())]
        assert abs(score - chance[names.index("play")]) < 1e-9


def test_the_same_seed_gives_the_same_model_and_more_epochs_a_lower_loss(tmp_path):
    given, labels = (part[::20] for part in examples())
    losses = [
        fit(given, labels, path=tmp_path / f"{i}.npz", num_buckets=1 << 10, epochs=epochs)
        for i, epochs in enumerate((2, 2, 8))
    ]
    assert losses[0] == losses[1] > losses[2] > 0
    first, second = (np.load(tmp_path / f"{i}.npz") for i in (0, 1))
    assert np.array_equal(first["weights"], second["weights"])


def test_one_step_follows_the_gradient(tmp_path):
    """From zero weights, two texts: step * (y - 1/2) / features, by hand."""
    path = tmp_path / "m.npz"
    loss = fit(
        ["yes", "no no"], ["a", "b"], path=path, ngram=1, num_buckets=1 << 16, epochs=1, rate=1.0
    )
    held = np.load(path)
    yes, no = (int(h) % (1 << 16) for h in words.ngrams(*_of("yes no"), 1)[0])
    np.testing.assert_allclose(held["weights"][yes], [0.5, -0.5])
    np.testing.assert_allclose(held["weights"][no], [-0.5, 0.5])
    np.testing.assert_allclose(held["bias"], [0.5 - 0.25, 0.25 - 0.5])
    assert loss == pytest.approx(np.log(2))


def _of(text: str) -> tuple[np.ndarray, np.ndarray]:
    found = words.normal_words([text])
    return found.hashes_W, found.offsets_N1


def test_as_a_labeller_and_its_mistakes(trained, tmp_path):
    stage = Label(name="form", labellers={"linear": Linear(path=trained[0], positive="play")})
    assert stage.files() == [trained[0]]
    result = stage(drive.records(texts.plays()[:5]))
    assert result.kept["label:form"].to_pylist() == ["play"] * 5
    with pytest.raises(UserError, match="Did you mean 'play'"):
        Linear(path=trained[0], positive="plays").predict(["x"])
    with pytest.raises(UserError, match="holds no model"):
        Linear(path=str(tmp_path / "none.npz")).predict(["x"])
    with pytest.raises(UserError, match="two labels at least"):
        fit(["a"], ["x"], path=tmp_path / "x.npz")


@pytest.mark.slow
def test_tells_spam_from_other_mail():
    labels, mails = zip(*texts.labelled_mails(), strict=True)
    order = random.Random(0).sample(range(len(mails)), len(mails))
    train, test = order[:5000], order[5000:]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/spam.npz"
        fit([mails[i] for i in train], [labels[i] for i in train], path=path)
        found, _ = Linear(path=path).predict([mails[i] for i in test])
    right = np.mean([a == labels[i] for a, i in zip(found, test, strict=True)])
    print(f"spam or not: {right:.4f} of {len(test)} mails")
    assert right > 0.95
