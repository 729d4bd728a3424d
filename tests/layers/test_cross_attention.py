"""Cross-attention against a plain sum, and a decoder's block, normalised before and after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.layers.attention import Attention
from lmjax.layers.cross_attention import CrossAttention
from lmjax.layers.mlp import GeluMlp
from lmjax.layers.norm import LayerNorm
from lmjax.layers.transformer import Block, Stack
from lmjax.sharding import unbox

B, T, M, D, H, G, K = 2, 4, 5, 8, 4, 2, 3
HEADS = {"dim": D, "num_heads": H, "num_kv_heads": G, "head_dim": K}


def drawn(module, *args, **kwargs):
    """Random variables, far from how they start."""
    random = np.random.default_rng(0)
    made = unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)))
    return jax.tree.map(lambda x: jnp.asarray(0.5 * random.normal(size=x.shape), "f4"), made)


def inputs():
    random = np.random.default_rng(1)
    x, memory = (jnp.asarray(random.normal(size=(B, n, D)), jnp.float32) for n in (T, M))
    segments, of_memory = (
        jnp.array([[1, 1, 2, 2], [1, 1, 1, 1]]),
        jnp.array([[1, 2, 2, 0, 1], [1] * 5]),
    )
    return x, memory, segments, of_memory


def plain(params, x, memory, segments, of_memory):
    """Head by head, in numpy."""
    params = jax.tree.map(np.asarray, params)
    q = np.einsum("btd,dhk->bthk", x, params["q"]["kernel"]) + params["q"]["bias"]
    kv = np.einsum("bmd,dgxk->bmgxk", memory, params["kv"]["kernel"]) + params["kv"]["bias"]
    out = np.zeros((B, T, D)) + params["out"]["bias"]
    for b, t, h in np.ndindex(B, T, H):
        k, v = kv[b, :, h // (H // G), 0], kv[b, :, h // (H // G), 1]
        weights = np.exp(k @ q[b, t, h] / np.sqrt(K)) * (np.asarray(of_memory)[b] == segments[b, t])
        out[b, t] += (weights / weights.sum()) @ v @ params["out"]["kernel"][h]
    return out


@pytest.mark.slow
def test_equals_a_plain_sum_and_its_own_cache():
    """Queries see what of the memory has their segment; a cache holds keys and values of it."""
    x, memory, segments, of_memory = inputs()
    layer = CrossAttention(**HEADS)
    variables = drawn(layer, x, memory_BMD=memory)
    run = jax.jit(layer.apply)
    found, _ = run(
        variables, x, memory_BMD=memory, segments_BT=segments, memory_segments_BM=of_memory
    )
    expected = plain(variables["params"], x, memory, segments, of_memory)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    cache, at = layer.init_cache(3, B, M), {"memory_segments_BM": of_memory, "layer": 1}
    first, cache = run(variables, x[:, :3], memory_BMD=memory, cache=cache, **at)
    then, _ = run(variables, x[:, 3:], cache=cache, **at)
    ones = np.ones((B, T), int)
    expected = plain(variables["params"], x, memory, ones, of_memory)
    together = np.concatenate([first, then], axis=1)
    np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)
    assert not np.any(cache["cross_key"][0]) and np.any(cache["cross_key"][1])


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoders_block_is_three_branches(norm_first):
    """Each norm before its branch, or behind the sum; in a stack of one layer."""
    x, memory, segments, of_memory = inputs()
    block = Block(
        attention_norm=LayerNorm(),
        attention=Attention(**HEADS),
        mlp_norm=LayerNorm(),
        mlp=GeluMlp(dim=D, hidden=6),
        norm_first=norm_first,
        cross_norm=LayerNorm(),
        cross_attention=CrossAttention(**HEADS),
    )
    given = {"memory_BMD": memory, "segments_BT": segments, "memory_segments_BM": of_memory}
    stack = Stack(block=block, num_layers=1)
    variables = drawn(stack, x, **given)
    found, _, _ = jax.jit(stack.apply)(variables, x, **given)
    params = jax.tree.map(lambda leaf: leaf[0], variables["params"]["block"])
    branches = {
        "attention": lambda h: jax.jit(block.attention.apply)(
            {"params": params["attention"]}, h, segments_BT=segments
        )[0],
        "cross": lambda h: plain(params["cross_attention"], h, memory, segments, of_memory),
        "mlp": lambda h: jax.jit(block.mlp.apply)({"params": params["mlp"]}, h)[0],
    }
    normed = jax.jit(LayerNorm().apply)
    for name, branch in branches.items():
        norm = {"params": params[f"{name}_norm"]}
        x = x + branch(normed(norm, x)) if norm_first else normed(norm, x + branch(x))
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
