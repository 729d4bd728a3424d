"""Ratings of films with what is known of both sides, as a table: does a user like a film?"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from lmjax.data.rows import Rows, rows_of
from lmjax.errors import UserError

GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
CATEGORIES = ("user", "item", "age", "gender", "occupation", "year")
HEADER = (*CATEGORIES, *GENRES, "liked")
LIKED = 4.0  # stars of five


def read_movielens(folder: Path) -> Rows:
    """MovieLens-100k in RecBole's atomic files, ratings joined with users and films.

    Source: Harper & Konstan, "The MovieLens Datasets", ACM TiiS 5 (2015): 100,000 ratings of 1,682
    films by 943 users, for research alone. `liked` is "yes" from four stars of five. Ages are in
    decades; each genre is a column of 0 and 1.

    Args:
      folder: holds ml-100k.inter, .user and .item.
    """
    users = {row["user_id"]: row for row in _atomic(folder / "ml-100k.user")}
    items = {row["item_id"]: row for row in _atomic(folder / "ml-100k.item")}
    cells = []
    for row in _atomic(folder / "ml-100k.inter"):
        user, item = users[row["user_id"]], items[row["item_id"]]
        genres = set(item["class"].split(" "))
        known = [row["user_id"], row["item_id"], f"{int(user['age']) // 10 * 10}s"]
        known += [user["gender"], user["occupation"], item["release_year"]]
        ones = [str(int(genre in genres)) for genre in GENRES]
        cells.append([*known, *ones, "yes" if float(row["rating"]) >= LIKED else "no"])
    return rows_of(HEADER, cells, name="movielens", first=2)


def made_ratings() -> Rows:
    """2,000 ratings like those of MovieLens: of 60 users, each of whom likes some genres."""
    random = np.random.default_rng(0)
    tastes, kinds = random.normal(size=(60, 4)), random.normal(size=(80, 4))
    cells = []
    for _ in range(2000):
        user, item = int(random.integers(60)), int(random.integers(80))
        liked = tastes[user] @ kinds[item] + 0.5 * random.normal() > 0
        known = [f"u{user}", f"i{item}", f"{10 * (user % 6 + 1)}s", "MF"[user % 2]]
        known += [f"work {user % 5}", str(1950 + item // 2)]
        genres = ["0"] * len(GENRES)
        genres[item % len(GENRES)] = "1"
        cells.append([*known, *genres, "yes" if liked else "no"])
    return rows_of(HEADER, cells, name="made:movielens", first=1)


def _atomic(file: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file whose header is name:type."""
    try:
        with file.open(encoding="utf-8", newline="") as text:
            reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = [cell.partition(":")[0] for cell in next(reader)]
            return [dict(zip(names, cells, strict=True)) for cells in reader]
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(f"{file} cannot be read: {error}. Install its package anew.") from error
