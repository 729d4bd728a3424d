"""A checkpoint written block by block is one as any other, whatever its blocks and chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.engine import streamed
from lmjax.engine.stored import find, verify
from lmjax.engine.streamed import chunk_of, write_checkpoint
from lmjax.errors import UserError

ABOUT = {"tokenizer": "t", "config": {}}


def arrays():
    random = np.random.default_rng(0)
    return {
        "params/a/kernel": random.normal(size=(5, 7, 6)).astype(np.float32),
        "params/b/table": random.normal(size=(10, 4)).astype(jnp.bfloat16),
        "params/c/scale": np.zeros(3, np.float32),
    }


def by_rows(held, step):
    def blocks(path):
        for start in range(0, len(held[path]), step):
            block = held[path][start : start + step].copy()
            yield (start, *(0,) * (block.ndim - 1)), block

    return blocks


@pytest.mark.parametrize("small_bytes", [0, 2**25])
def test_it_is_what_was_given(tmp_path, monkeypatch, small_bytes):
    """In many blocks of several chunks, each summed in parts, and all of it on the disk."""
    synced = []
    one = streamed._sync_one
    monkeypatch.setattr(streamed, "_sync_one", lambda path: (synced.append(path), one(path)))
    for name, value in (("CHUNK_BYTES", 120), ("SUM_BYTES", 50), ("SMALL_BYTES", small_bytes)):
        monkeypatch.setattr(streamed, name, value)
    held = arrays()
    (tmp_path / f"3{streamed.UNFINISHED}" / "left").mkdir(parents=True)
    like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in held.items()}
    folder = write_checkpoint(tmp_path, 3, like, by_rows(held, 2), ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["3"]
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    unfinished = tmp_path / f"3{streamed.UNFINISHED}"
    assert names <= {p.relative_to(unfinished).as_posix() for p in synced if p != tmp_path}
    assert sum(name.startswith("state/d/") for name in names) > 2 and "about/metadata" in names
    (stored,) = find(tmp_path)
    assert verify(stored) == []
    for path, x in held.items():
        found = stored.array(path)
        assert found.chunk_layout.read_chunk.shape == chunk_of(x[:2].shape, x.dtype, 120)
        np.testing.assert_array_equal(np.asarray(found.read().result()), x)
    with pytest.raises(UserError, match="has a checkpoint of step 3"):
        write_checkpoint(tmp_path, 3, like, by_rows(held, 2), ABOUT)
