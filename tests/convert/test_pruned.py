"""One-shot pruning of a workdir: against numpy on a network's own inputs, and what it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.adapt.adapted import adapted
from lmjax.convert.imports import import_folder
from lmjax.convert.pruned import _Probe, _squares, prune
from lmjax.errors import UserError
from lmjax.layers.linear import Linear
from lmjax.models.llama import llama
from lmjax.sharding import unbox
from tests.convert import folders

MODEL = llama(num_layers=1, dim=16, num_heads=2, hidden=24, vocab_size=30, max_length=12)


@pytest.mark.slow
def test_squares_are_those_of_the_inputs():
    """Of one layer, whose inputs an interceptor of the first layer's modules can see."""
    import flax.linen as nn

    tokens = np.random.default_rng(0).integers(0, 30, (3, 9)).astype("i4")
    params = jax.tree.map(
        lambda x: 3 * x, unbox(MODEL.init(jax.random.key(0), tokens[:, :-1]))["params"]
    )
    seen = {}

    def spy(run, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            x, path = args[0], "/".join(context.module.path)
            sums = jnp.sum(jnp.square(x), tuple(range(x.ndim - context.module.in_dims)))
            jax.debug.callback(lambda value: seen.__setitem__(path, np.asarray(value)), sums)
        return run(*args, **kwargs)

    with nn.intercept_methods(spy):
        MODEL.apply({"params": params}, tokens[:, :-1])
    jax.effects_barrier()
    found = _squares(adapted(model=MODEL, adapters=(_Probe(),)), params, tokens)
    assert found.keys() == seen.keys() and len(seen) >= 4
    for path, squares in found.items():
        np.testing.assert_allclose(np.squeeze(squares, 0), seen[path], rtol=1e-5)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    base = tmp_path_factory.mktemp("pruned")
    source = folders.write(base / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
    import_folder(source, base / "run")
    (base / "text.txt").write_text("".join(f"line {i * i} of so many. " for i in range(300)))
    return base


@pytest.mark.slow
def test_magnitude_keeps_two_of_four(imported):
    to = imported / "magnitude"
    found = prune(imported / "run", to, method="magnitude", pattern="2:4")
    assert set(found.sparsity.values()) == {0.5} and np.isnan(found.before)
    before, after = (lmjax.load(str(w)).variables["params"] for w in (imported / "run", to))
    up, pruned = (
        np.asarray(p["blocks"]["block"]["mlp"]["down"]["kernel"]) for p in (before, after)
    )
    groups = np.abs(up).reshape(3, -1, 4, 32)
    kept = groups >= np.sort(groups, axis=2)[:, :, 2:3]
    np.testing.assert_array_equal(pruned, np.where(kept.reshape(up.shape), up, 0))
    assert isinstance(lmjax.load(str(to)).generate("so", max_tokens=3), str)


@pytest.mark.slow
def test_wanda_reports_losses(imported):
    to = imported / "wanda"
    text = str(imported / "text.txt")
    found = prune(imported / "run", to, sparsity=0.25, text=text, length=32, num_windows=16)
    assert set(found.sparsity.values()) == {0.25}
    assert np.isfinite(found.before) and found.before != found.after
    again = prune(
        to,
        imported / "again",
        method="magnitude",
        sparsity=0.25,
        text=text,
        length=32,
        num_windows=16,
    )
    assert again.before == again.after == found.after


@pytest.mark.slow
def test_refused(imported):
    for fields, message in (
        ({}, "wanda reads text"),
        ({"method": "size"}, "method is 'size'"),
        ({"method": "magnitude", "sparsity": 1.0}, "sparsity is 1.0"),
        ({"method": "magnitude", "pattern": "2:5"}, "5 does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            prune(imported / "run", imported / "none", **fields)
        assert not (imported / "none").exists()
    with pytest.raises(UserError, match="holds a run already"):
        prune(imported / "run", imported / "run", method="magnitude")
