"""The Transformer: agreement with torch's, sinusoids by hand, cached, packed, on eight devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from lmjax import sharding
from lmjax.core import EncoderDecoder
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.layers.sinusoidal import SinusoidalPositions
from lmjax.models.transformer import transformer
from lmjax.ops.losses import cross_entropy, logits
from lmjax.sharding import Layout
from tests.models import transformer_reference
from tests.models.test_families import same_gradients, shapes_of
from tests.models.test_llama import abstract_params, count

SIZES = {
    "num_layers": transformer_reference.ENCODER,
    "num_decoder_layers": transformer_reference.DECODER,
    "dim": transformer_reference.D,
    "num_heads": transformer_reference.HEADS,
    "hidden": transformer_reference.HIDDEN,
    "vocab_size": transformer_reference.V,
    "vocab_multiple": 1,
    "max_length": 32,
}


@functools.cache
def stored():
    return dict(np.load(transformer_reference.PATH))


def variables_of(arrays, *, seed=0):
    names = {k.removeprefix("gradient:"): x.shape for k, x in arrays.items() if ":" in k}
    drawn = {n: transformer_reference.weight(n, shape, seed=seed) for n, shape in names.items()}
    weights = transformer_reference.from_torch_names(drawn)
    return {"params": jax.tree.map(jnp.asarray, unflatten_dict(weights, sep="/"))}


def loss_of(model, variables, arrays):
    """(mean over real targets, labels smoothed; logits) of the reference's arrays."""
    given = {n: jnp.asarray(x, jnp.int32) for n, x in arrays.items() if x.dtype.kind == "i"}
    output = model.apply(
        variables,
        given["tokens"],
        source_BM=given["source"],
        segments_BT=given["mask"],
        source_segments_BM=given["source_mask"],
    )
    nll, extra = cross_entropy(
        output.hidden_BTD, output.unembedding, given["targets"], label_smoothing=0.1
    )
    mean = jnp.sum((nll + extra) * given["mask"]) / jnp.sum(given["mask"])
    return mean, logits(output.hidden_BTD, output.unembedding)


def agrees(arrays, *, seed=0):
    """Asserts equal logits, loss and gradients of real tokens."""
    model, variables = transformer(**SIZES), variables_of(arrays, seed=seed)
    assert shapes_of(abstract_params(model)) == shapes_of(variables["params"])
    loss = jax.value_and_grad(lambda v: loss_of(model, v, arrays), has_aux=True)
    (value, scores), gradients = jax.jit(loss)(variables)
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    real = arrays["mask"] > 0
    np.testing.assert_allclose(scores[real], arrays["logits"][real], rtol=1e-5, atol=1e-5)
    names = {k.removeprefix("gradient:"): x for k, x in arrays.items() if ":" in k}
    expected = transformer_reference.from_torch_names(names)
    same_gradients(gradients["params"], expected, atol=1e-5)


def test_equals_stored_torch_reference():
    """Of random weights that `transformer_reference` gave to torch's `nn.Transformer`."""
    agrees(stored())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_live_torch(seed):
    pytest.importorskip("torch")
    agrees(transformer_reference.measure(seed=seed), seed=seed)


def test_sinusoids_by_hand():
    found = SinusoidalPositions(16).apply({}, jnp.arange(40)[None])[0]
    np.testing.assert_allclose(found, transformer_reference.positions(40), atol=1e-5)
    assert float(found[3, 1]) == pytest.approx(math.cos(3), abs=1e-6)


@pytest.mark.slow
def test_cached_decode_is_full_forward():
    """Positions go on from the cache, one token at a time, with sources of unequal lengths."""
    arrays, model = stored(), transformer(**SIZES)
    variables = variables_of(arrays)
    source, tokens, segments = (
        jnp.asarray(arrays[name], jnp.int32) for name in ("source", "tokens", "source_mask")
    )
    whole = model.apply(variables, tokens, source_BM=source, source_segments_BM=segments)
    output = model.apply(
        variables,
        tokens[:, :1],
        source_BM=source,
        source_segments_BM=segments,
        cache=model.init_cache(4, 20, source_length=source.shape[1]),
    )
    found = [output.hidden_BTD]
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    for t in range(1, tokens.shape[1]):
        output = step(tokens[:, t : t + 1], output.cache)
        found.append(output.hidden_BTD)
    together = np.concatenate(found, axis=1)
    np.testing.assert_allclose(together, whole.hidden_BTD, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"data": 2, "fsdp": 2, "tensor": 2}, {"context": 4, "fsdp": 2}], ids=str
)
def test_eight_devices_equal_one(layout, devices):
    """Rows, heads and lengths split; the lengths divide, and the vocabulary is padded."""
    model, random = transformer(**SIZES | {"vocab_multiple": 4}), np.random.default_rng(0)
    made = abstract_params(model)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), "f4"), made)
    arrays = {
        name: random.integers(0, 37, (4, 16)).astype("i4")
        for name in ("source", "tokens", "targets")
    }
    arrays["mask"] = (np.arange(16)[None] < np.array([[5], [9], [16], [4]])).astype("i4")
    arrays["source_mask"] = arrays["mask"][:, ::-1].astype("i4")
    loss = jax.value_and_grad(lambda v: loss_of(model, v, arrays)[0])

    def spread(variables):
        with sharding.use(Layout(**layout).mesh(devices)):
            return loss(variables)

    value, gradients = jax.jit(loss)({"params": params})
    spread_value, spread_gradients = jax.jit(spread)({"params": params})
    np.testing.assert_allclose(spread_value, value, rtol=1e-5)
    same_gradients(spread_gradients["params"], paths_of(gradients["params"]), atol=1e-5)


@pytest.mark.parametrize(("size", "expected"), [("base", 63_082_496), ("big", 214_245_376)])
def test_exact_parameter_counts(size, expected):
    """Of the paper's sizes with 37,000 tokens; section 5.1 says about as many."""
    assert count(transformer(size=size)) == expected


def test_dropout_is_where_the_paper_has_it():
    """On embeddings and branches; not on attention, nor on what a stack returns."""
    model = transformer(size="big")
    blocks = model.encoder.block, model.decoder.block
    assert [block.dropout for block in blocks] == [0.3, 0.3]
    assert [block.attention.dropout for block in blocks] == [0.0, 0.0]
    assert (model.dropout, model.returned_dropout) == (0.3, 0.0)
    assert model.norm is model.encoder_norm is None
    assert isinstance(model, EncoderDecoder)


def test_given_numbers_stand_in_place_of_the_presets():
    model = transformer(size="base", num_layers=2, num_decoder_layers=1, dim=64, dropout=0.0)
    assert (model.encoder.num_layers, model.decoder.num_layers) == (2, 1)
    assert (model.embed.scale, model.decoder.block.mlp.hidden) == (8.0, 2048)
    assert dataclasses.asdict(model.embed)["init_std"] == 0.125


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "bigg"}, "no preset of size 'bigg'. Did you mean 'big'"),
        ({"dim": 15, "num_heads": 5}, "dim is 15: sinusoids come in pairs"),
        ({"num_heads": 5}, "num_heads"),
        ({"start_id": 37}, "start_id is 37, beyond the vocabulary of 37"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        transformer(**SIZES | change)
