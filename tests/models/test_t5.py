"""T5: agreement with transformers, padded, packed, cached, rematerialised and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from lmjax import sharding
from lmjax.core import EncoderDecoder
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.t5 import t5, t5_v1_0, t5_v1_1
from lmjax.ops.losses import cross_entropy, logits
from lmjax.sharding import Layout
from tests.models import t5_reference
from tests.models.test_families import same_gradients, shapes_of
from tests.models.test_llama import abstract_params, count

SIZES = {
    "num_layers": 2,
    "num_decoder_layers": 3,
    "dim": 16,
    "num_heads": 3,
    "head_dim": 6,
    "hidden": 20,
    "vocab_size": 37,
    "max_length": 32,
    "num_buckets": 8,
    "max_distance": 10,
}
KINDS = {"v1.1": {}, "v1.0": {"gated": False, "tied": True}}


@functools.cache
def stored():
    return dict(np.load(t5_reference.PATH))


def variables_of(arrays, *, seed=0):
    names = {k.removeprefix("gradient:"): x.shape for k, x in arrays.items() if ":" in k}
    drawn = {name: t5_reference.weight(name, shape, seed=seed) for name, shape in names.items()}
    weights = t5_reference.from_torch_names(drawn)
    return {"params": jax.tree.map(jnp.asarray, unflatten_dict(weights, sep="/"))}


def loss_of(model, variables, batch, **arguments):
    """(mean over the weights, logits) of a batch by the reference's names."""
    output = model.apply(
        variables,
        batch["tokens"],
        source_BM=batch["source"],
        segments_BT=batch["segments"],
        source_segments_BM=batch["source_segments"],
        **arguments,
    )
    nll, _ = cross_entropy(output.hidden_BTD, output.unembedding, batch["targets"])
    mean = jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])
    return mean, logits(output.hidden_BTD, output.unembedding)


def batch_of(arrays):
    source_mask, mask = t5_reference.masks()
    names = ("source", "tokens", "targets", "weights")
    given = {name: jnp.asarray(arrays[name], jnp.int32) for name in names}
    segments = {"segments": mask, "source_segments": source_mask}
    return {**given, **{name: jnp.asarray(x, jnp.int32) for name, x in segments.items()}}


def agrees(kind, arrays, *, seed=0):
    """Asserts equal logits, loss and gradients, with padding at the left and at the right."""
    model, variables, batch = (
        t5(**SIZES, **KINDS[kind]),
        variables_of(arrays, seed=seed),
        batch_of(arrays),
    )
    assert shapes_of(abstract_params(model)) == shapes_of(variables["params"])
    loss = jax.value_and_grad(lambda v: loss_of(model, v, batch), has_aux=True)
    (value, scores), gradients = jax.jit(loss)(variables)
    np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
    real = np.asarray(batch["segments"], bool)
    np.testing.assert_allclose(scores[real], arrays["logits"][real], rtol=1e-4, atol=1e-4)
    names = {k.removeprefix("gradient:"): x for k, x in arrays.items() if ":" in k}
    expected = t5_reference.from_torch_names(names)
    same_gradients(gradients["params"], expected, atol=1e-4)


def test_equals_stored_transformers_reference():
    """Of random weights that `t5_reference` gave to a T5 v1.1 of transformers."""
    agrees("v1.1", stored())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_live_transformers(kind):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    agrees(kind, t5_reference.measure(kind, seed=1), seed=1)


@pytest.mark.slow
def test_cached_decode_is_full_forward_and_knows_its_source():
    """Targets of every length, in rows of unequal sources; then one token at a time."""
    arrays, model = stored(), t5(**SIZES)
    variables, batch = variables_of(arrays), batch_of(arrays)
    source, tokens = batch["source"], batch["tokens"]
    padding = jnp.pad(source, ((0, 0), (0, 3)))
    segments = jnp.pad(batch["source_segments"], ((0, 0), (0, 3)))
    ask = jax.jit(
        lambda tokens, cache: model.apply(
            variables, tokens, source_BM=padding, source_segments_BM=segments, cache=cache
        )
    )
    step = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    scores = jax.jit(lambda output: logits(output.hidden_BTD, output.unembedding))
    whole = model.apply(
        variables, tokens, source_BM=source, source_segments_BM=batch["source_segments"]
    )
    for length in (1, 4, 11):
        prompt = jnp.where(jnp.arange(11)[None] < length, tokens[:, :11], 0)
        output = ask(prompt, model.init_cache(3, 20, source_length=22))
        found = [scores(output)[:, :length]]
        cache = {**output.cache, "length": jnp.int32(length)}
        for t in range(length, 17):
            output = step(tokens[:, t : t + 1], cache)
            cache = output.cache
            found.append(scores(output))
        together = np.concatenate(found, axis=1)
        np.testing.assert_allclose(together, scores(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_packed_pairs_are_pairs_apart():
    """Two pairs in a row, and padding behind: a target sees its own source only."""
    arrays, model = stored(), t5(**SIZES)
    variables, batch = variables_of(arrays), batch_of(arrays)
    source, tokens = batch["source"][2:], batch["tokens"][2:]
    (a, b), (c, d) = (8, 11), (6, 9)
    run = jax.jit(functools.partial(model.apply, variables))
    one = run(tokens[:, :c], source_BM=source[:, :a]).hidden_BTD
    two = run(tokens[:, c : c + d], source_BM=source[:, a : a + b]).hidden_BTD
    segments, source_segments = (
        jnp.repeat(jnp.array([1, 2, 0]), jnp.array(sizes), total_repeat_length=sum(sizes))[None]
        for sizes in ((c, d, 2), (a, b, 3))
    )
    together = run(
        jnp.pad(tokens[:, : c + d], ((0, 0), (0, 2))),
        source_BM=jnp.pad(source, ((0, 0), (0, 3))),
        segments_BT=segments,
        source_segments_BM=source_segments,
    ).hidden_BTD
    np.testing.assert_allclose(together[:, :c], one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[:, c : c + d], two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_rematerialised_and_unrolled_equal_the_loop(remat):
    arrays = stored()
    variables, batch = variables_of(arrays), batch_of(arrays)

    def run(**changes):
        model = t5(**SIZES, dropout=0.2, **changes)
        rngs = {"dropout": jax.random.key(3)}
        loss = lambda v: loss_of(model, v, batch, train=True, rngs=rngs)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(variables)

    value, gradients = run()
    again, others = run(remat=remat, unroll=2)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert abs(value - arrays["loss"]) > 1e-3  # something was dropped
    same_gradients(others["params"], paths_of(gradients["params"]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"data": 2, "tensor": 2, "context": 2}, {"fsdp": 4, "tensor": 2}, {"context": 4}]
)
def test_eight_devices_equal_one(layout, devices):
    """Rows, heads (and their bias) and the lengths split, on four rows of equal lengths."""
    sizes = SIZES | {"num_heads": 4, "vocab_multiple": 4}
    model, random = t5(**sizes), np.random.default_rng(0)
    made = abstract_params(model)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), "f4"), made)
    tokens, source = (jnp.asarray(random.integers(0, 37, (4, 16)), jnp.int32) for _ in range(2))
    segments = jnp.asarray(np.arange(16) // np.array([[5], [9], [16], [4]]), jnp.int32)
    batch = {
        "source": source,
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "weights": jnp.ones((4, 16)),
        "segments": segments,
        "source_segments": segments[:, ::-1],
    }
    loss = jax.value_and_grad(lambda v: loss_of(model, v, batch)[0])

    def spread(variables):
        some = devices[: int(np.prod(list(layout.values())))]
        with sharding.use(Layout(**layout).mesh(some)):
            return loss(variables)

    value, gradients = jax.jit(loss)({"params": params})
    spread_value, spread_gradients = jax.jit(spread)({"params": params})
    np.testing.assert_allclose(spread_value, value, rtol=1e-5)
    same_gradients(spread_gradients["params"], paths_of(gradients["params"]), atol=1e-5)


def test_a_pipeline_is_refused(devices):
    model, tokens = t5(**SIZES | {"num_layers": 2, "num_decoder_layers": 2}), jnp.zeros((2, 4), int)
    variables = {"params": abstract_params(model)}
    with (
        sharding.use(Layout(stage=2).mesh(devices[:2])),
        pytest.raises(UserError, match="stage=2, and layers with a relative position bias"),
    ):
        jax.eval_shape(lambda v: model.apply(v, tokens, source_BM=tokens), variables)


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        (t5_v1_1, "small", 76_961_152),
        pytest.param(t5_v1_1, "base", 247_577_856, marks=pytest.mark.slow),
        pytest.param(t5_v1_1, "large", 783_150_080, marks=pytest.mark.slow),
        pytest.param(t5_v1_1, "xl", 2_849_757_184, marks=pytest.mark.slow),
        (t5_v1_1, "xxl", 11_135_332_352),
        (t5_v1_0, "small", 60_506_624),
        pytest.param(t5_v1_0, "base", 222_903_552, marks=pytest.mark.slow),
        pytest.param(t5_v1_0, "large", 737_668_096, marks=pytest.mark.slow),
        (t5_v1_0, "11b", 11_307_321_344),
    ],
)
def test_exact_parameter_counts(preset, size, expected):
    assert count(preset(size=size, vocab_multiple=1000)) == expected


def test_given_numbers_stand_in_place_of_the_presets():
    model = t5_v1_1(size="nano", num_layers=3, head_dim=8, vocab_size=100)
    assert (model.encoder.num_layers, model.decoder.num_layers, model.vocab_size) == (3, 3, 100)
    assert model.decoder.block.cross_attention.head_dim == 8
    assert isinstance(model, EncoderDecoder)
    with pytest.raises(UserError, match="no preset of size 'smal'"):
        t5_v1_1(size="smal")


def test_flop_by_hand():
    """Two multiply-adds a weight and token; a source of 5 tokens, a target of 3."""
    model = t5(**SIZES)
    D, E, F, V = 16, 18, 20, 37  # E = heads x head dim
    encoder = 2 * 5 * (2 * (4 * D * E + 3 * D * F) + 4 * E * 5)
    own = 3 * 3 * (2 * (4 * D * E + 3 * D * F))
    cross = 3 * (2 * (2 * D * E * 3 + 2 * D * E * 5) + 4 * E * 3 * 5)
    same = encoder + own + cross + 2 * D * V * 3
    causal, full = same + 3 * 4 * E * (1 + 2 + 3), same + 3 * 4 * E * 9
    assert model.flop(5, 3) == pytest.approx((causal, full))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_buckets": 6}, "num_buckets is 6: must be a positive multiple of 4"),
        ({"max_distance": 4}, "max_distance is 4: must be above num_buckets / 2 = 4"),
        ({"start_id": 37}, "start_id is 37, beyond the vocabulary of 37"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        t5(**SIZES | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a source"),
        ({"source_BM": (1, 40)}, "40 tokens are longer than the model's max_length 32"),
        ({"source_BM": (1, 4), "segments_BT": (1, 4)}, "and their sources none"),
    ],
)
def test_wrong_calls_are_refused(arguments, message):
    model = t5(**SIZES)
    given = {name: jnp.zeros(shape, int) for name, shape in arguments.items()}
    run = functools.partial(model.apply, tokens_BT=jnp.zeros((1, 4), int), **given)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(run, {"params": abstract_params(model)})
