"""Images with their classes as a data set: a folder a class, arrays in a file, or small digits."""

# N images, H height, W width, C channels.

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from lmjax.core import Batch, Spec
from lmjax.data.batches import check_workers
from lmjax.data.corpus import Split
from lmjax.data.pictures import DIGITS, Pictures, read_pictures
from lmjax.data.shuffled import InRows
from lmjax.errors import UserError, did_you_mean

log = logging.getLogger("lmjax")


@dataclass(frozen=True, kw_only=True)
class Images(InRows):
    """One image a row, and its class; honours `core.LabelledDataset`.

    An example has images (float32 [size, size, channels], black 0 and white 1), labels (int32 [])
    and weights (float32 []: 1). The pictures are read once, brought to `size`, and kept as bytes in
    the cache, from which rows are read by random access.

    The training split comes in another order each epoch, the other in its own.

    Args:
      path: see `pictures.read_pictures`.
      size: height and width.
      channels: 3 for colours, 1 for grey.
      labels: the classes in their order; () for all that there are, sorted.
      split: "train" or "valid".
      valid_fraction: the share that is held out, drawn by the sha256 of the picture, so that copies
        of one are never in both.
      workers: processes that read batches.
    """

    path: str = DIGITS
    size: int = 8
    channels: int = 1
    labels: Sequence[str] = ()
    split: Split = "train"
    valid_fraction: float = 0.2
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values that cannot work."""
        if self.split not in ("train", "valid"):
            raise UserError(
                f"split is {self.split!r}." + did_you_mean(str(self.split), ("train", "valid"))
            )
        if self.size < 1 or self.channels not in (1, 3):
            raise UserError(
                f"size is {self.size} and channels {self.channels}: give at least 1, and 1 or 3."
            )
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid_fraction is {self.valid_fraction}: give one in [0, 1).")
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels is {list(self.labels)}: give each class once.")
        check_workers(self.workers)

    @property
    def example(self) -> Spec:
        """Shapes and dtypes of one example; reads nothing."""
        shape = (self.size, self.size, self.channels)
        return {
            "images": jax.ShapeDtypeStruct(shape, np.float32),
            "labels": jax.ShapeDtypeStruct((), np.int32),
            "weights": jax.ShapeDtypeStruct((), np.float32),
        }

    def check(self) -> None:
        """Reads the pictures; raises UserError where they cannot be learned from."""
        held = np.bincount(self._pictures.labels[self._chosen], minlength=len(self.classes))
        if not len(self._chosen):
            raise UserError(f"the {self.split} split of {self.path} is empty: see valid_fraction.")
        if self.split == "train" and np.count_nonzero(held) < 2:
            raise UserError(
                f"the training split of {self.path} holds one class only: there is nothing to tell "
                "apart. Give pictures of several classes."
            )
        shown = ", ".join(f"{c}: {n}" for c, n in zip(self.classes, held, strict=True))
        log.info("%s, %s: %d images (%s)", self.path, self.split, len(self._chosen), shown)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels; reads the pictures where `labels` does not name them."""
        return tuple(self.labels) or self._pictures.classes

    @property
    def fitted(self) -> Mapping[str, str]:
        """The classes."""
        return {"classes": json.dumps(self.classes, ensure_ascii=False)}

    @property
    def fingerprint(self) -> str:
        """Names what every batch is made of: sha256 of the pictures, their classes and the cut."""
        made_of = (self._pictures.sha256, self.split, self.valid_fraction, self.classes)
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    @functools.cached_property
    def _pictures(self) -> Pictures:
        return read_pictures(
            self.path, size=self.size, channels=self.channels, labels=tuple(self.labels)
        )

    @functools.cached_property
    def _chosen(self) -> np.ndarray:
        """The numbers of this split's pictures."""
        draws, limit = self._pictures.draws, self.valid_fraction
        return np.flatnonzero(draws < limit if self.split == "valid" else draws >= limit)

    @property
    def _rows(self) -> _Rows:
        return _Rows(self._pictures.pixels, self._pictures.labels, self._chosen)


def validation(of: Images) -> Images:
    """The validation split of the same pictures."""
    return replace(of, split="valid")


def num_classes(of: Images) -> int:
    """How many classes there are, for a model's configuration."""
    return len(of.classes)


@dataclass(frozen=True)
class _Rows:
    """Pictures by their number in the split."""

    pixels: np.ndarray
    labels: np.ndarray
    chosen: np.ndarray

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.chosen)

    def rows(self, examples: Sequence[int]) -> Batch:
        """These pictures, stacked."""
        picked = self.chosen[list(examples)]
        images_NHWC = self.pixels[picked].astype(np.float32) / np.float32(255)
        weights = np.ones(len(picked), np.float32)
        return {"images": images_NHWC, "labels": self.labels[picked], "weights": weights}
