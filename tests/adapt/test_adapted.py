"""Adapters change nothing at the start, then what their papers say; merged equals adapted."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from lmjax.adapt.adalora import AdaLora
from lmjax.adapt.adapted import adapted, split
from lmjax.adapt.houlsby import Houlsby
from lmjax.adapt.ia3 import Ia3
from lmjax.adapt.lora import Lora
from lmjax.adapt.prefix import Prefix
from lmjax.core import EncoderDecoder
from lmjax.engine.program import draft_program
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.t5 import t5
from lmjax.sharding import Layout, unbox
from lmjax.tasks.causal_lm import CausalLM
from tests.adapt.models import TOKENS, drawn, flat, small_llama

LORA = Lora(targets=("query", "v_proj", "attention/out", "up"), rank=4)
ADAPTERS = {
    "lora": LORA,
    "rslora": dataclasses.replace(LORA, scaling="rslora"),
    "dora": dataclasses.replace(LORA, dora=True),
    "adalora": AdaLora(targets=("key", "down"), rank=4, alpha=3.0),
    "ia3": Ia3(),
    "houlsby": Houlsby(hidden=5),
    "prefix": Prefix(length=3),
}
NEUTRAL = {"b": 0.0, "magnitude": 0.0, "values": 0.0, "factor": 1.0, "up": 0.0, "up_bias": 0.0}


@pytest.mark.parametrize("name", ["lora", pytest.param("houlsby", marks=pytest.mark.slow)])
def test_init_is_that_of_the_base_with_adapters_that_add_nothing(name):
    model = small_llama()
    tuned = adapted(model=model, adapters=(ADAPTERS[name],))
    base = jax.jit(model.init)(jax.random.key(1), TOKENS)
    made = jax.jit(tuned.init)(jax.random.key(1), TOKENS)
    base_counts = model.count_params(unbox(base)["params"])
    own, base = paths_of(made["params"]), paths_of(base["params"])
    for path, x in base.items():
        np.testing.assert_array_equal(own[path].value, x.value)
        assert own[path].axes == x.axes
    added = {path: x for path, x in own.items() if path not in base}
    for path, x in added.items():
        kind = path.rpartition("/")[2]
        for piece in ("query_", "value_"):
            kind = kind.removeprefix(piece)
        if kind in NEUTRAL:
            assert (x.value == NEUTRAL[kind]).all(), path
        else:
            assert kind == "down_bias" or len(np.unique(x.value)) > 1, path
    # The kernel's axes, split as it is: stacked over layers, inputs by fsdp, heads by tensor.
    if name == "lora":
        at = "blocks/block/attention/qkv/lora"
        assert added[f"{at}/query_a"].axes == ("layers", "embed", None)
        assert added[f"{at}/value_b"].axes == ("layers", None, "kv_heads", None, "head_dim")
        kernel = own["blocks/block/attention/qkv/kernel"].value.shape
        assert added[f"{at}/query_b"].value.shape == (2, 4, *kernel[2:3], 2, kernel[4])
    params = unbox(made)["params"]
    counts = tuned.count_params(params)
    assert counts == {**base_counts, name: sum(x.value.size for x in added.values())}


def by_hand(adapter, kernel, added, *, part):
    """What a merged kernel is, [in, out] in float64."""
    if isinstance(adapter, Ia3):
        return kernel * added[f"{part}factor"].reshape(1, -1)
    a, b = (added[f"{part}{name}"].astype(np.float64) for name in ("a", "b"))
    rank = b.shape[0]
    a, b = a.reshape(-1, rank), b.reshape(rank, -1)
    if isinstance(adapter, AdaLora):
        return kernel + a @ np.diag(added[f"{part}values"]) @ b * (3.0 / (rank + 1e-5))
    scale = 16 / rank**0.5 if adapter.scaling == "rslora" else 16 / rank
    changed = kernel + scale * a @ b
    if adapter.dora:
        size = np.linalg.norm(kernel, axis=0) + added[f"{part}magnitude"].reshape(-1)
        changed = size * changed / np.linalg.norm(changed, axis=0)
    return changed


@pytest.mark.parametrize(
    ("name", "path", "part", "where"),
    [
        pytest.param("rslora", "attention/qkv", "query_", (0, 2), marks=pytest.mark.slow),
        ("dora", "attention/qkv", "value_", (3, 4)),
        pytest.param("dora", "mlp/up", "", None, marks=pytest.mark.slow),
        ("adalora", "attention/qkv", "key_", (2, 3)),
        pytest.param("ia3", "attention/qkv", "value_", (3, 4), marks=pytest.mark.slow),
    ],
)
def test_merged_kernels_are_those_of_the_paper(name, path, part, where):
    tuned = adapted(model=small_llama(), adapters=(ADAPTERS[name],))
    params = drawn(tuned)
    merged = flat(tuned.merged(params, TOKENS))[f"blocks/block/{path}/kernel"]
    own = flat(params)
    for layer in range(2):
        at = f"blocks/block/{path}"
        old = own[f"{at}/kernel"][layer]
        added = {
            k.rpartition("/")[2]: x[layer]
            for k, x in own.items()
            if k.startswith(f"{at}/{ADAPTERS[name].name}/")
        }
        cut = (slice(None),) * 2 + ((slice(*where),) if where else ())
        cut = cut[: old.ndim] if where else (slice(None), slice(None))
        want = by_hand(
            ADAPTERS[name], old[cut].reshape(32, -1).astype(np.float64), added, part=part
        )
        np.testing.assert_allclose(merged[layer][cut].reshape(32, -1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dora", "adalora", "ia3"))]
)
def test_merged_equals_adapted_and_unmerged_is_the_base(name):
    model = small_llama()
    tuned = adapted(model=model, adapters=(ADAPTERS[name],))
    params = drawn(tuned)
    merged = tuned.merged(params, TOKENS)
    one = jax.jit(tuned.apply)({"params": params}, TOKENS).hidden_BTD
    two = jax.jit(model.apply)({"params": merged}, TOKENS).hidden_BTD
    base = jax.jit(model.apply)({"params": split(params, {tuned.adapters[0].name})[0]}, TOKENS)
    assert abs(one - base.hidden_BTD).max() > 0.01
    np.testing.assert_allclose(one, two, atol=1e-4)
    if name == "dora":
        with pytest.raises(UserError, match="DoRA cannot be unmerged"):
            tuned.unmerged(merged, params, TOKENS)
        return
    again = flat(tuned.unmerged(merged, params, TOKENS))
    for path, x in flat(params).items():
        np.testing.assert_allclose(again[path], x, atol=1e-6, rtol=1e-5)


def batches(batch_size=8):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 61, (batch_size, 17), dtype=np.int32)
    weights = (rng.random((batch_size, 16)) < 0.7).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@dataclasses.dataclass(frozen=True)
class From:
    """A task that starts from given parameters."""

    task: CausalLM
    params: dict

    def __getattr__(self, name):
        return getattr(self.task, name)

    def init(self, rng, batch):
        made = paths_of(self.task.init(rng, batch)["params"])
        given = paths_of(self.params)
        boxed = {path: x.replace_boxed(given[path]) for path, x in made.items()}
        return {"params": unflatten_dict(boxed, sep="/")}


def trained(
    model, params, layout, devices, *, steps=3, trainable="/(lora|ia3|houlsby|adalora|prefix)/"
):
    """(losses, state) after some steps."""
    example = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batches().items()}
    program = draft_program(
        From(CausalLM(model=model), params),
        optax.adam(1e-2),
        layout,
        example,
        batch_size=8,
        trainable=trainable,
        devices=devices,
    ).compile()
    state, losses = program.init(), []
    for _ in range(steps):
        state, metrics = program.train_step(state, program.put(batches()))
        losses.append(float(metrics["loss"].value))
    return losses, state


LAYOUTS = {
    "fsdp x tensor": Layout(data=2, fsdp=2, tensor=2),
    "stages": Layout(stage=2, fsdp=2, data=2),
    "rounds": Layout(stage=2, stage_repeats=2, data=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_one_device_equals_eight_with_the_base_frozen_to_the_bit(name, layout, devices):
    model = small_llama(remat="full")
    if layout == "rounds":
        model = model.clone(blocks=model.blocks.clone(num_layers=4))
    tuned = adapted(model=model, adapters=(ADAPTERS[name],))
    params = drawn(tuned)
    params = jax.tree.map(lambda x: 0.2 * x, params)
    one, state = trained(tuned, params, Layout(), devices[:1])
    eight, _ = trained(tuned, params, LAYOUTS[layout], devices)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    start, moved = paths_of(params), paths_of(jax.device_get(state.params))
    assert all(not np.array_equal(x, start[path]) for path, x in moved.items())
    base, _ = split(params, {tuned.adapters[0].name})
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), base)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "houlsby"])
def test_cached_decode_equals_the_full_forward(name):
    tuned = adapted(model=small_llama(), adapters=(ADAPTERS[name],))
    variables = {"params": drawn(tuned)}
    whole = jax.jit(tuned.apply)(variables, TOKENS).hidden_BTD
    cache, found = tuned.init_cache(2, 12), []
    step = jax.jit(tuned.apply)
    for part in (TOKENS[:, :6], TOKENS[:, 6:]):
        output = step(variables, part, cache=cache)
        cache, found = output.cache, [*found, output.hidden_BTD]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-4)


@pytest.mark.slow
def test_dropout_falls_on_the_adapters_inputs_in_training_alone():
    tuned = adapted(model=small_llama(), adapters=(dataclasses.replace(LORA, dropout=0.5),))
    plain = adapted(model=small_llama(), adapters=(LORA,))
    variables = {"params": drawn(tuned)}

    def hidden(model, seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        run = jax.jit(partial(model.apply, train=seed is not None))
        return run(variables, TOKENS, rngs=rngs).hidden_BTD

    np.testing.assert_array_equal(hidden(tuned), hidden(plain))
    assert abs(hidden(tuned, 1) - hidden(tuned, 2)).max() > 0.01
    np.testing.assert_array_equal(hidden(tuned, 1), hidden(tuned, 1))


def test_an_encoder_decoder_stays_one():
    model = t5(
        num_layers=1, dim=32, num_heads=4, head_dim=8, hidden=48, vocab_size=61, max_length=32
    )
    tuned = adapted(model=model, adapters=(Lora(targets=("decoder*/query", "k_proj"), rank=2),))
    assert isinstance(tuned, EncoderDecoder)
    assert tuned.start_id == model.start_id
    found = set(tuned.sites(TOKENS)["lora"])
    assert any("cross_attention/q" in path for path in found)
    assert any("cross_attention/kv" in path for path in found)


@pytest.mark.slow
def test_a_prefix_is_text_that_came_before(devices):
    """With the keys and values of a real prefix, the rest is what it is after that text."""
    model = small_llama()
    base = drawn(model)
    tuned = adapted(model=model, adapters=(Prefix(length=4),))
    cache = model.init_cache(1, 4)
    cache = jax.jit(model.apply)({"params": base}, TOKENS[:1, :4], cache=cache).cache
    flat = flat_of(base)
    for name, kind in (("keys", "key"), ("values", "value")):
        # [L, 1, G, 4, K] -> [L, 4, G, K]
        flat[f"blocks/block/attention/prefix/{name}"] = jnp.swapaxes(cache[kind][:, 0], 1, 2)
    params = unflatten_dict(flat, sep="/")
    positions = jnp.arange(4, 12)[None]
    run = jax.jit(tuned.apply)
    rest = run({"params": params}, TOKENS[:1, 4:], positions_BT=positions).hidden_BTD
    whole = jax.jit(model.apply)({"params": base}, TOKENS[:1]).hidden_BTD
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-4)
    # Packed: the second document sees the prefix, and not the first.
    segments = jnp.array([[1] * 3 + [2] * 5])
    packed_positions = jnp.array([[4, 5, 6, 4, 5, 6, 7, 8]])
    packed = run(
        {"params": params},
        TOKENS[:1, 4:],
        positions_BT=packed_positions,
        segments_BT=segments,
    ).hidden_BTD
    alone = run({"params": params}, TOKENS[:1, 7:], positions_BT=packed_positions[:, 3:]).hidden_BTD
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-4)
    # Decoding keeps the prefix beside the cache.
    cache, found = tuned.init_cache(2, 12), []
    drawn_params = {"params": drawn(tuned)}
    for part in (TOKENS[:, :7], TOKENS[:, 7:]):
        output = run(drawn_params, part, cache=cache)
        cache, found = output.cache, [*found, output.hidden_BTD]
    full = run(drawn_params, TOKENS).hidden_BTD
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=1e-4)
    with pytest.raises(UserError, match="prefix cannot be merged"):
        tuned.merged(params, TOKENS)


def flat_of(params):
    return {path: jnp.asarray(x) for path, x in paths_of(params).items()}


def test_a_prefix_goes_to_attention_alone():
    with pytest.raises(UserError, match=r"'up', and the model .* Allowed: attention"):
        adapted(model=small_llama(), adapters=(Prefix(targets=("up",)),)).sites(TOKENS)
    with pytest.raises(UserError, match="names 'attention', and the model"):
        adapted(model=small_llama(), adapters=(Lora(targets=("attention",)),)).sites(TOKENS)


BAD = {
    "query2": "no such product. Did you mean 'query'?",
    "qproj": "Did you mean 'q_proj'?",
    "mlp/uup": "Did you mean 'mlp/up'?",
}


@pytest.mark.parametrize("target", BAD)
def test_a_target_that_is_no_product_is_an_error(target):
    tuned = adapted(model=small_llama(), adapters=(Lora(targets=("up", target), rank=2),))
    with pytest.raises(UserError) as error:
        tuned.sites(TOKENS)
    assert BAD[target] in str(error.value)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Lora(targets=("value",), rank=17), "attention/qkv/value is 32 x 16: it has a rank of at"),
        (Houlsby(targets=("query",)), "whose result is split into heads"),
        (Houlsby(hidden=33), "a bottleneck is narrower"),
        (Ia3(targets=("key",), inputs=("key",)), "shares its inputs with other products"),
    ],
)
def test_what_cannot_be_tuned_is_an_error_before_training(adapter, message):
    with pytest.raises(UserError, match=message):
        adapted(model=small_llama(), adapters=(adapter,)).sites(TOKENS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(targets=("up",), rank=0), "rank is 0"),
        (lambda: Lora(targets=("up",), dropout=1.0), "dropout is 1.0"),
        (lambda: Lora(targets=("up",), alpha=-1.0), "alpha is -1.0"),
        (lambda: Lora(targets=()), "give names"),
        (lambda: Ia3(inputs=("dwn",)), "no target. Did you mean 'down'"),
        (lambda: adapted(model=None, adapters=()), "at least one"),
        (lambda: adapted(model=None, adapters=(LORA, LORA)), "two adapters are called 'lora'"),
    ],
)
def test_numbers_that_make_no_adapter_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
