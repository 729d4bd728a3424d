"""Small models and parameters for the tests of adapters."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.engine.state import paths_of
from lmjax.models.bert import bert
from lmjax.models.llama import llama
from lmjax.sharding import unbox

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


def small_llama(**fields):
    return llama(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=61,
        vocab_multiple=4,
        max_length=32,
        hidden=48,
        **fields,
    )


def small_bert(**fields):
    return bert(
        num_layers=2,
        dim=32,
        num_heads=4,
        hidden=48,
        vocab_size=61,
        max_length=32,
        dropout=0.0,
        **fields,
    )


def drawn(model, seed=0):
    """Parameters of a model, every one away from what it starts as."""
    shapes = jax.eval_shape(lambda: unbox(model.init(jax.random.key(0), TOKENS))["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape) + (x.ndim == 2), jnp.float32), shapes
    )


def flat(params):
    return {path: np.asarray(x) for path, x in paths_of(params).items()}
