"""How far images that are made lie from real ones: the Frechet distance of a classifier's features.

N images, F features, C classes, Z latent dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.core import Dataset, LabelledDataset, Session, Task
from lmjax.data.pictures import grid
from lmjax.errors import UserError

FEWEST = 0.01  # the share of the samples that a class must have to count as made
COLUMNS, ROWS = 16, 10  # of the picture of samples


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of the means and covariances of two sets.

    Source: Dowson & Landau (1982); Heusel et al., arXiv:1706.08500, equation 6.
    """
    mean = np.sum((a_NF.mean(0) - b_NF.mean(0)) ** 2)
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a_NF, b_NF)]
    roots = []
    for covariance in covariances:
        values, vectors = np.linalg.eigh(covariance)
        roots.append((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
    # tr (C_a C_b)^(1/2) is the sum of these, which no root of a rounded zero spoils.
    both = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(mean + sum(np.trace(c) for c in covariances) - 2 * both)


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """Compares images that an adversarial task makes with labelled real ones, and draws some.

    The features are the hidden layer (ReLU) of a classifier with one, learned of the images that
    the run trains on and their labels when it is first asked: full-batch Adam at 0.01, its seed
    fixed, so that any run on the same data has the same one. Metrics:
      frechet: the distance of as many samples as there are images of both splits, to these.
      frechet_real: of one half of these images to the other: what no generator is asked to beat.
      classes: how many classes at least 1 % of the samples are of, by that classifier.
      classifier_accuracy: of the classifier, on `data`: what these numbers can be trusted for.
    The picture is samples.png of the run's folder.

    Args:
      data: held-out images with labels, of the data set that the run trains on.
      batch_size: samples that are made at a time, over all devices.
      hidden: units of the classifier's hidden layer.
      steps: for how many it learns.
      seed: of the random numbers that the samples are made of, the same each time.
    """

    data: LabelledDataset
    batch_size: int = 128
    hidden: int = 256
    steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch_size, self.hidden, self.steps) < 1:
            raise UserError(
                f"batch_size {self.batch_size}, hidden {self.hidden}, steps {self.steps}: each "
                "must be at least 1."
            )

    def check(self, task: Task, data: Dataset, *, ways: int) -> None:
        """The task must make images, and both data sets must have them, of the same classes."""
        if not hasattr(task, "generator"):
            raise UserError(
                f"{type(task).__name__} makes no images, and Frechet compares such: use it with "
                "lmjax.tasks.adversarial.Adversarial."
            )
        if self.batch_size % ways:
            raise UserError(
                f"an evaluation's batch_size is {self.batch_size}, which does not divide into "
                f"{ways} data-parallel parts: make it a multiple of {ways}."
            )
        task.check(self.data)
        self.data.check()
        for held in (data, self.data):
            if not hasattr(held, "classes") or "images" not in held.example:
                raise UserError(f"{type(held).__name__} has no images with classes.")
        if self.data.classes != cast(LabelledDataset, data).classes:
            raise UserError("the evaluation's data has other classes than the training's.")

    def __call__(self, session: Session) -> Mapping[str, float | str]:
        """The metrics; writes the picture."""
        train, valid = self._real(session)
        count = len(train[0]) + len(valid[0])
        made = self._samples(session, count)
        session.keep("samples.png", grid(made[: COLUMNS * ROWS], columns=COLUMNS, scale=4))
        net = self._classifier(session)
        real = np.random.default_rng(self.seed).permutation(np.concatenate([train[0], valid[0]]))
        (seen, _), (_, scores), (drawn, guesses) = (
            _features(net, images) for images in (real, valid[0], made)
        )
        shares = np.bincount(guesses.argmax(-1), minlength=guesses.shape[-1]) / count
        return {
            "frechet": frechet_distance(drawn, seen),
            "frechet_real": frechet_distance(seen[: count // 2], seen[count // 2 :]),
            "classes": float(np.sum(shares >= FEWEST)),
            "classifier_accuracy": float(np.mean(scores.argmax(-1) == valid[1])),
        }

    def _real(self, session: Session) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of the training and of the held-out split, whole."""
        return [_whole(data, self.batch_size) for data in (session.data, self.data)]

    def _samples(self, session: Session, count: int) -> np.ndarray:
        latent_dim = cast(Any, session.task).generator.latent_dim
        random = np.random.default_rng(self.seed)
        shard, num_shards = session.shards
        rows = self.batch_size // num_shards
        made = []
        for _ in range(-(-count // self.batch_size)):
            z_BZ = random.standard_normal((self.batch_size, latent_dim), np.float32)
            mine = {"latents": z_BZ[shard * rows : (shard + 1) * rows]}
            made.append(session.predict(mine)["images"])
        return np.concatenate(made)[:count]

    def _classifier(self, session: Session) -> Any:
        images, labels = self._real(session)[0]
        key = session.data.fingerprint, self.hidden, self.steps
        return _learned(key, _Held(images, labels), len(self.data.classes))


class _Held:
    """Arrays as an argument that a cache does not look at."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)


@functools.lru_cache(maxsize=2)
def _learned(key: tuple[str, int, int], held: _Held, num_classes: int) -> Any:
    """The classifier's kernels and biases."""
    _, hidden, steps = key
    x_NI = jnp.asarray(held.images.reshape(len(held.images), -1))
    labels_N = jnp.asarray(held.labels)
    random = np.random.default_rng(0)
    sizes = ((x_NI.shape[1], hidden), (hidden, num_classes))
    kernels = [random.normal(0, np.sqrt(2 / a), (a, b)).astype(np.float32) for a, b in sizes]
    net = [(jnp.asarray(k), jnp.zeros(k.shape[1])) for k in kernels]
    method = optax.adam(0.01)

    @jax.jit
    def learn(net: Any) -> Any:
        def loss(net: Any) -> jax.Array:
            scores_NC = _apply(net, x_NI)[1]
            return optax.softmax_cross_entropy_with_integer_labels(scores_NC, labels_N).mean()

        def step(_: int, carry: Any) -> Any:
            net, state = carry
            updates, state = method.update(jax.grad(loss)(net), state, net)
            return optax.apply_updates(net, updates), state

        return jax.lax.fori_loop(0, steps, step, (net, method.init(net)))[0]

    return jax.device_get(learn(net))


def _apply(net: Any, x_NI: Any) -> tuple[Any, Any]:
    """(features, scores of the classes)."""
    (first, first_bias), (second, second_bias) = net
    features_NF = jnp.maximum(x_NI @ first + first_bias[None], 0)
    return features_NF, features_NF @ second + second_bias[None]


def _features(net: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return jax.device_get(_apply(net, images.reshape(len(images), -1)))


def _whole(data: Dataset, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    batches = list(data.epoch_batches(batch_size=batch_size))
    images, labels, weights = (
        np.concatenate([np.asarray(b[k]) for b in batches]) for k in ("images", "labels", "weights")
    )
    return images[weights > 0], labels[weights > 0]
