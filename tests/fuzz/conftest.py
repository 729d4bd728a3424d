"""A small corpus, and its tokens in the cache of the session."""

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of text that every config can be read with."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    return str(path)
