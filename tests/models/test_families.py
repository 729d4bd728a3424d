"""Llama and its kin: agreement with transformers, past their windows, packed, padded and cached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.gemma import gemma, gemma2, gemma3
from lmjax.models.llama import llama
from lmjax.models.mistral import mistral, mistral_preset
from lmjax.models.moe import moe
from lmjax.models.qwen import qwen, qwen2, qwen3
from lmjax.ops.losses import logits
from lmjax.ops.rope import LinearScaling, RopeScaling, YarnScaling
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM
from tests.models import family_reference
from tests.models.family_reference import FIRST, LENGTH, PADDING
from tests.models.llama_reference import from_torch_names
from tests.models.test_llama import abstract_params, count

SIZES = {
    "num_layers": 3,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden": 40,
    "vocab_size": 37,
    "max_length": 64,
    "epsilon": 1e-5,
}
HEADS = {"num_heads": 4, "num_kv_heads": 2}
GEMMA = {"head_dim": 10, "window": 5, "query_scale": 14**-0.5}
ALIKE = {"mistral", "qwen3_moe"}  # made of parts that another family proves by default
MODELS = {
    "llama": functools.partial(
        llama, rope_theta=500.0, rope_scaling=RopeScaling(factor=8.0, original_length=16)
    ),
    "mistral": functools.partial(mistral, window=5, head_dim=10),
    "qwen2": functools.partial(
        qwen,
        qkv_bias=True,
        window=5,
        window_layers=(False, True, True),
        rope_theta=300.0,
        rope_scaling=YarnScaling(factor=4.0, original_length=16),
    ),
    "qwen3": functools.partial(
        qwen,
        qk_norm=True,
        head_dim=10,
        tied=True,
        rope_theta=1e4,
        rope_scaling=LinearScaling(factor=2.0),
    ),
    "qwen2_moe": functools.partial(
        moe,
        qkv_bias=True,
        num_experts=4,
        experts_per_token=2,
        expert_hidden=12,
        shared_hidden=20,
        gated_shared=True,
        normalise=False,
        rope_theta=1e4,
    ),
    "qwen3_moe": functools.partial(
        moe,
        qk_norm=True,
        head_dim=10,
        num_experts=4,
        experts_per_token=2,
        expert_hidden=12,
        rope_theta=1e4,
    ),
    "gemma2": functools.partial(
        gemma,
        **GEMMA,
        window_layers=(True, False, True),
        attention_softcap=2.0,
        logit_softcap=3.0,
    ),
    "gemma3": functools.partial(
        gemma,
        **GEMMA,
        window_layers=(True, True, False),
        window_rope_theta=100.0,
        rope_theta=1e4,
        rope_scaling=LinearScaling(factor=2.0),
        qk_norm=True,
    ),
}
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3")


@functools.cache
def stored(family):
    return dict(np.load(family_reference.path(family)))


def weights_of(arrays, family, *, seed=0):
    """The reference's weights, by our names; the file holds gradients of their shapes."""
    names = {k.removeprefix("gradient:"): x.shape for k, x in arrays.items() if ":" in k}
    unit = family_reference.unit_norms(family)
    drawn = {
        name: family_reference.weight(name, shape, unit_norms=unit, seed=seed)
        for name, shape in names.items()
    }
    return from_torch_names(drawn, **HEADS)


def variables_of(weights):
    from flax.traverse_util import unflatten_dict

    return {"params": jax.tree.map(jnp.asarray, unflatten_dict(weights, sep="/"))}


def model_of(family, **changes):
    sizes = {**SIZES, **changes}
    if family.endswith("moe"):
        del sizes["hidden"]
    return MODELS[family](**sizes)


def agrees(family, arrays, *, seed=0):
    """Asserts equal logits, loss and gradients; whole, in packed documents and after padding."""
    model = model_of(family)
    weights = weights_of(arrays, family, seed=seed)
    assert shapes_of(abstract_params(model)) == {k: x.shape for k, x in weights.items()}
    rows, at = len(arrays["tokens"]), np.arange(LENGTH)
    second, real = at >= FIRST, at >= PADDING
    kinds = (  # (positions, segments, weight in the loss) of each token
        (at, np.ones(LENGTH), at < LENGTH - 1),
        (at - FIRST * second, second, np.zeros(LENGTH)),
        (np.maximum(at - PADDING, 0), real, np.zeros(LENGTH)),
    )
    positions, segments, counted = (np.repeat(x, rows, axis=0) for x in zip(*kinds, strict=True))
    tokens = jnp.asarray(np.tile(arrays["tokens"], (3, 1)), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "weights": jnp.asarray(counted, jnp.float32),
        "positions": jnp.asarray(positions, jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
    }

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(variables):
        where = {"positions_BT": batch["positions"], "segments_BT": batch["segments"]}
        output = model.apply(variables, tokens, **where)
        task = CausalLM(model=model)
        found = task.loss(variables, batch, jax.random.key(0), train=False).loss.value
        return found, logits(output.hidden_BTD, output.unembedding)

    (found, scores), gradients = jax.jit(loss)(variables_of(weights))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(found, arrays["loss"], rtol=1e-5)
    close(scores[:rows], arrays["logits"])
    close(scores[rows : 2 * rows], arrays["apart"])
    close(scores[2 * rows, PADDING:], arrays["padded"])
    names = {k.removeprefix("gradient:"): x for k, x in arrays.items() if ":" in k}
    same_gradients(gradients["params"], from_torch_names(names, **HEADS), atol=1e-4)


def shapes_of(params):
    return {path: x.shape for path, x in paths_of(params).items()}


def same_gradients(found, expected, *, atol):
    found = paths_of(found)
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(
            gradient / scale, expected[path] / scale, atol=atol, rtol=0, err_msg=path
        )


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if f in ALIKE else ()) for f in MODELS],
)
def test_equals_stored_transformers_reference(family):
    """Of random weights that `family_reference` gave to a model of transformers."""
    agrees(family, stored(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_equals_live_transformers(family):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    agrees(family, family_reference.measure(family, seed=1), seed=1)


@pytest.mark.parametrize(
    "family",
    [f if f in WINDOWED else pytest.param(f, marks=pytest.mark.slow) for f in MODELS],
)
def test_cached_decode_is_full_forward_for_prompts_of_every_length(family):
    """From 1 token to past the window of 5; prompts are padded to a bucket, as in decoding."""
    model, arrays = model_of(family), stored(family)
    variables = variables_of(weights_of(arrays, family))
    tokens = jnp.asarray(arrays["tokens"][:, :14], jnp.int32)
    run = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    scores = jax.jit(lambda output: logits(output.hidden_BTD, output.unembedding))
    for length in range(1, 13):
        prompt = jnp.where(jnp.arange(12)[None] < length, tokens[:, :12], 0)
        output = run(prompt, model.init_cache(3, 16))
        found = [scores(output)[:, :length]]
        cache = {**output.cache, "length": jnp.int32(length)}
        for t in range(length, 14):
            output = run(tokens[:, t : t + 1], cache)
            cache = output.cache
            found.append(scores(output))
        together = np.concatenate(found, axis=1)
        np.testing.assert_allclose(together, arrays["logits"][:, :14], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "change", "reach"),
    [
        ("mistral", {"window": 3}, 2 * 3),
        ("gemma3", {"window": 3, "window_layers": (True, False, True)}, 15),
        ("gemma3", {"window": 3, "window_layers": (True, True, True)}, 2 * 3),
    ],
)
def test_a_token_reaches_back_by_the_windows_of_its_layers(family, change, reach):
    """Changing token j changes the last hidden state if it is at most `reach` tokens before it."""
    model = MODELS[family](**{**SIZES, **change})
    variables = variables_of(weights_of(stored(family), family))
    tokens = np.tile(stored(family)["tokens"][:1, :16], (17, 1))
    for row in range(16):  # the last row stays
        tokens[row, row] = (tokens[row, row] + 1) % 37
    hidden_BTD = jax.jit(model.apply)(variables, tokens).hidden_BTD
    changed = np.any(hidden_BTD[:16, -1] != hidden_BTD[16:, -1], axis=-1)
    assert np.array_equal(changed, np.arange(16) >= 15 - reach)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("gemma2", Layout(data=2, tensor=2, context=2)),
        ("gemma3", Layout(data=2, tensor=2, context=2)),
        ("qwen2_moe", Layout(data=1, expert=2, tensor=2, fsdp=2)),
    ],
)
def test_eight_devices_equal_one(family, layout, devices):
    """Rows, heads and the length split: windows and caps go round the ring, tokens to experts."""
    arrays = stored(family)
    model = model_of(family, vocab_multiple=2)
    weights = weights_of(arrays, family)
    for name in ("embed/table", "unembed/table"):
        if name in weights:
            weights[name] = np.pad(weights[name], ((0, 1), (0, 0)))
    variables = variables_of(weights)
    tokens = jnp.asarray(np.concatenate([arrays["tokens"], arrays["tokens"][:1]]), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "weights": jnp.ones(tokens.shape),
        "segments": jnp.asarray(np.tile(np.arange(LENGTH) >= FIRST, (4, 1)), jnp.int32),
    }

    @jax.value_and_grad
    def loss(variables):
        task = CausalLM(model=model)
        return task.loss(variables, batch, jax.random.key(0), train=False).loss.value

    def spread(variables):
        with sharding.use(layout.mesh(devices)):
            return loss(variables)

    value, gradients = jax.jit(loss)(variables)
    spread_value, spread_gradients = jax.jit(spread)(variables)
    np.testing.assert_allclose(spread_value, value, rtol=1e-5)
    same_gradients(spread_gradients["params"], paths_of(gradients["params"]), atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        (mistral_preset, "7b-v0.1", 7_241_732_096),
        (mistral_preset, "7b-v0.3", 7_248_023_552),
        (mistral_preset, "nemo-12b", 12_247_782_400),
        (mistral_preset, "small-24b", 23_572_403_200),
        (qwen2, "0.5b", 494_032_768),
        (qwen2, "7b", 7_615_616_512),
        (qwen2, "72b", 72_706_203_648),
        (qwen3, "0.6b", 596_049_920),
        (qwen3, "8b", 8_190_735_360),
        (qwen3, "32b", 32_762_123_264),
        (gemma2, "2b", 2_614_341_888),
        (gemma2, "27b", 27_227_128_320),
        (gemma3, "270m", 268_098_176),
        (gemma3, "1b", 999_885_952),
        (gemma3, "27b", 27_009_346_304),
    ],
)
def test_exact_parameter_counts(preset, size, expected):
    assert count(preset(size=size)) == expected


def test_given_numbers_stand_in_place_of_the_presets():
    small = {"num_layers": 7, "dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden": 96}
    assert mistral_preset(**small, window=9).blocks.block.attention.window == 9
    assert mistral_preset(**small, size="7b-v0.2").blocks.block.attention.window is None
    attention = gemma3(**small, vocab_size=100, window=9).blocks.block.attention
    assert attention.window_layers == (True,) * 5 + (False, True)
    assert (attention.window, attention.head_dim, attention.query_scale) == (9, 16, None)
    assert gemma3(**small, vocab_size=100).vocab_size == 100
    for preset in (mistral_preset, qwen2, qwen3, gemma2, gemma3):
        with pytest.raises(UserError, match="no preset of size '3b14'"):
            preset(size="3b14")


def test_flop_counts_what_a_window_leaves():
    """Of 8 tokens with a window of 3 they see 1, 2, 3, 3, ... keys: 21 in all, not 36."""
    whole, near = mistral(**SIZES), mistral(**SIZES, window=3)
    per_key = 4 * 32 * 3  # four a feature of q and layer
    for tokens, model, causal, full in ((8, whole, 36 / 8, 8), (8, near, 21 / 8, 3)):
        kernels = model.flop_per_token(tokens)[1] - full * per_key
        assert kernels == pytest.approx(whole.flop_per_token(1)[1] - per_key)
        assert model.flop_per_token(tokens)[0] == pytest.approx(kernels + causal * per_key)
    mixed = qwen(**SIZES, window=3, window_layers=(True, False, True))
    thirds = (2 * np.array(near.flop_per_token(8)) + np.array(whole.flop_per_token(8))) / 3
    np.testing.assert_allclose(mixed.flop_per_token(8), thirds)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mistral", {"window": 0}, "window is 0: must be at least 1"),
        ("qwen2", {"window_layers": (True,)}, "speaks of 1 layers, and num_layers is 3"),
        ("qwen2", {"window": None}, "window is None: set it"),
        ("gemma2", {"attention_softcap": 0.0}, "attention_softcap is 0.0: must be positive"),
        ("gemma3", {"query_scale": float("inf")}, "query_scale is inf"),
        (
            "gemma3",
            {"window_rope_theta": None, "window_rope_scaling": LinearScaling(factor=2.0)},
            "window_rope_theta is None",
        ),
    ],
)
def test_wrong_settings_are_refused(family, change, message):
    with pytest.raises(UserError, match=message):
        MODELS[family](**{**SIZES, **MODELS[family].keywords, **change})
