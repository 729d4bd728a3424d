"""What the training rows of a table say of its columns, and rows as arrays by that."""

# N rows, F features, K categorical columns, C classes or values.

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmjax.data.rows import Rows
from lmjax.errors import UserError

Scaling = Literal["standard", "minmax", "none"]
UNKNOWN = 0  # the code of a category that training did not see, in every column
_MOST_CATEGORIES = 200  # of a column whose role is inferred
_WORDS = 3.0  # a column with more words a cell is text


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which columns are read as what, by name."""

    targets: tuple[str, ...]
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """A column of numbers: x becomes (x - shift) / scale.

    Args:
      fill: what stands for a missing number, before scaling: the mean.
      indicator: whether a feature of its own says that the number is missing.
    """

    name: str
    shift: float = 0.0
    scale: float = 1.0
    fill: float = 0.0
    indicator: bool = False


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """A column of categories: the first of `values` has the code 1, what is not there `UNKNOWN`."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """All that was learned of the training rows; `to_json` is kept with the weights.

    Exactly one of `classes` and `values` is not empty: the names of the labels, or the columns that
    are regressed.
    """

    numeric: tuple[Numeric, ...]
    categorical: tuple[Categorical, ...]
    text: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...] = ()
    values: tuple[Numeric, ...] = ()

    @property
    def num_features(self) -> int:
        """The numeric columns and the indicators of missing numbers."""
        return sum(1 + column.indicator for column in self.numeric)

    @property
    def num_categories(self) -> int:
        """The codes of all categorical columns together, with one unknown each."""
        return sum(1 + len(column.values) for column in self.categorical)

    def to_json(self) -> str:
        """See `from_json`."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Columns:
        """Inverse of `to_json`; raises UserError where it is damaged."""
        try:
            tree = json.loads(text)
            return cls(
                numeric=tuple(Numeric(**c) for c in tree["numeric"]),
                categorical=tuple(
                    Categorical(name=c["name"], values=tuple(c["values"]))
                    for c in tree["categorical"]
                ),
                text=tuple(tree["text"]),
                targets=tuple(tree["targets"]),
                classes=tuple(tree["classes"]),
                values=tuple(Numeric(**c) for c in tree["values"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"the saved columns are damaged: {error!r}.") from error

    def features(self, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scaled numbers, missing ones (NaN) filled, and indicators: float32 [N, F]."""
        found: list[np.ndarray] = []
        for column in self.numeric:
            x_N = numbers[column.name]
            missing_N = np.isnan(x_N)
            found.append((np.where(missing_N, column.fill, x_N) - column.shift) / column.scale)
            if column.indicator:
                found.append(missing_N)
        return np.stack(found, axis=1).astype(np.float32)

    def categories(self, cells: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Codes, int32 [N, K]; those of a column follow those of the one before it."""
        found, first = [], 0
        for column in self.categorical:
            codes = {value: code for code, value in enumerate(column.values, start=first + 1)}
            found.append([codes.get(cell, first + UNKNOWN) for cell in cells[column.name]])
            first += 1 + len(column.values)
        return np.array(found, np.int32).T

    def scaled_values(self, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """What is regressed, scaled: float32 [N, C]."""
        scaled = [(numbers[v.name] - v.shift) / v.scale for v in self.values]
        return np.stack(scaled, axis=1).astype(np.float32)

    def unscaled(self, values_NC: np.ndarray) -> np.ndarray:
        """Inverse of `scaled_values`, in float64."""
        shift, scale = (np.array([getattr(v, k) for v in self.values]) for k in ("shift", "scale"))
        return np.asarray(values_NC, np.float64) * scale[None] + shift[None]


def fit_numeric(name: str, x_N: np.ndarray, scaling: Scaling) -> Numeric:
    """Scaling of a column by its training numbers; NaN is a missing one.

    "standard": mean 0 and population standard deviation 1. "minmax": from 0 to 1. A column of one
    number is only shifted. Only the numbers that are there count, as in scikit-learn's scalers.
    """
    there = x_N[~np.isnan(x_N)]
    if not len(there):
        raise UserError(
            f"the column {name!r} has no number in the training split: name its role, or leave it "
            "out (ignore)."
        )
    mean = float(np.mean(there))
    shift, scale = 0.0, 1.0
    if scaling == "standard":
        shift, scale = mean, float(np.std(there))
    elif scaling == "minmax":
        shift, scale = float(np.min(there)), float(np.ptp(there))
    if scale <= 1e-12 * max(1.0, abs(shift)):
        scale = 1.0
    indicator = len(there) < len(x_N)
    return Numeric(name=name, shift=shift, scale=scale, fill=mean, indicator=indicator)


def fit_categorical(name: str, cells: Sequence[str], *, min_count: int) -> Categorical:
    """The categories that stand at least `min_count` times in the training rows, sorted."""
    counts = Counter(cells)
    kept = sorted(value for value, n in counts.items() if n >= min_count and value)
    return Categorical(name=name, values=tuple(kept))


def number(cell: str) -> float:
    """The number that a cell spells; raises ValueError for none, and for one that is not finite."""
    if "_" in cell:  # Python's spelling, nobody else's
        raise ValueError(cell)
    x = float(cell)
    if not math.isfinite(x):
        raise ValueError(cell)
    return x


def infer_roles(
    rows: Rows, *, targets: Sequence[str], ignore: Sequence[str], missing: frozenset[str]
) -> Roles:
    """Roles of all columns but these: by what most of their cells are.

    Numbers where 19 in 20 cells spell one, so that a few that do not are found to be bad; text
    where cells have more than three words on average and most are different; else categories.

    Raises UserError for a column of too many categories, which is then an identifier or text.
    """
    roles: dict[str, list[str]] = {"numeric": [], "categorical": [], "text": []}
    for i, name in enumerate(rows.header):
        if name in targets or name in ignore:
            continue
        cells = [c for row in rows.cells if (c := row[i].strip()) not in missing]
        if not cells:
            raise UserError(f"the column {name!r} is empty: leave it out (ignore).")
        if sum(map(_is_number, cells)) >= 0.95 * len(cells):
            roles["numeric"].append(name)
            continue
        different = len(set(cells))
        words = sum(len(cell.split()) for cell in cells) / len(cells)
        if words > _WORDS and different > len(cells) / 2:
            roles["text"].append(name)
        elif different > _MOST_CATEGORIES:
            raise UserError(
                f"the column {name!r} has {different} different cells ({cells[0]!r}, ...), too "
                "many to be taken for categories: name it in categorical, text or ignore."
            )
        else:
            roles["categorical"].append(name)
    named: dict[str, Any] = {role: tuple(names) for role, names in roles.items()}
    return Roles(targets=tuple(targets), **named)


def _is_number(cell: str) -> bool:
    try:
        number(cell)
    except ValueError:
        return False
    return True
