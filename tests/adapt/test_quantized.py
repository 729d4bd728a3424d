"""Models over quantised weights, against the same models over the numbers that those stand for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.adapt.quantized import quantized
from lmjax.engine.precision import Precision
from lmjax.engine.program import compile_program
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.layers.mlp import SwiGlu
from lmjax.models.llama import llama
from lmjax.ops.blockwise import KINDS
from lmjax.sharding import Layout, unbox
from lmjax.tasks.causal_lm import CausalLM
from tests.adapt.models import TOKENS, drawn, flat, small_bert, small_llama

X = np.random.default_rng(1).normal(size=(2, 3, 10)).astype(np.float32)
LORA = Lora(targets=("query", "value", "down"), rank=2, alpha=4.0)


def params_of(model, *example):
    return unbox(model.init(jax.random.key(0), *example))["params"]


def test_a_layer_starts_as_its_kernels_quantised():
    """And computes what they do, with the gradient of x, and none of them."""
    mlp = SwiGlu(dim=10, hidden=12)
    model = quantized(model=mlp, kind="int4", block=4, targets=("gate", "down"))
    own, plain = (jax.jit(lambda m=m: params_of(m, X))() for m in (model, mlp))
    made = model.quantised(plain, X)
    jax.tree.map(np.testing.assert_array_equal, own, made)
    assert own["gate"]["kernel_int4"].shape == (5, 12)
    assert own["down"]["kernel_scale"].shape == (3, 10)
    assert set(own["up"]) == {"kernel"}
    whole = model.plain(own, X)
    assert jax.tree.structure(whole) == jax.tree.structure(plain)

    def total(model, params, x):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)[0]))

    aware = quantized(model=mlp, kind="int4", block=4, targets=("gate", "down"), aware=True)

    @jax.jit
    def everything(own, plain, whole):
        few = jax.value_and_grad(total, argnums=2)(model, own, X)
        wanted, (slopes, slope) = jax.value_and_grad(total, argnums=(1, 2))(mlp, whole, X)
        trained = jax.value_and_grad(total, argnums=1)(aware, plain, X)
        return (few, trained), ((wanted, slope), (wanted, slopes))  # straight-through

    found, wanted = everything(own, plain, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, wanted)


def test_refused():
    mlp = SwiGlu(dim=10, hidden=12)
    for fields, message in (
        ({"kind": "int3"}, "kind is 'int3'"),
        ({"block": 0}, "block is 0"),
        ({"targets": ()}, "targets is"),
        ({"model": quantized(model=mlp)}, "quantised already"),
        ({"model": adapted(model=mlp, adapters=(LORA,))}, "has adapters"),
    ):
        with pytest.raises(UserError, match=message):
            quantized(**{"model": mlp, **fields})
    with pytest.raises(UserError, match=r"names 'gaet'.*Did you mean 'gate'"):
        quantized(model=mlp, targets=("gaet",)).init(jax.random.key(0), X)
    with pytest.raises(UserError, match="down has 7 inputs, and nf4 packs two"):
        quantized(model=SwiGlu(dim=10, hidden=7), kind="nf4").init(jax.random.key(0), X)
    with pytest.raises(UserError, match="set dora=False"):
        dora = dataclasses.replace(LORA, dora=True)
        adapted(model=quantized(model=mlp), adapters=(dora,))


@pytest.mark.slow
def test_a_part_of_a_kernel_is_no_target():
    model = quantized(model=small_llama(), targets=("query",))
    with pytest.raises(UserError, match=r"names 'query', a part of the kernel .*name 'qkv'"):
        model.sites(TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [small_llama, small_bert])
def test_models_compute_what_their_plain_ones_do(kind, make):
    """In loops over layers too, with everything computed again."""
    model = quantized(model=make(), kind=kind, block=16)
    plain = drawn(make())
    params = model.quantised(plain, TOKENS)
    whole = model.plain(params, TOKENS)
    assert dict(model.count_params(params)) == dict(make().count_params(plain))
    table = params["embed"]

    def gradient(model, params, **fields):
        def total(table):
            hidden = model.apply({"params": {**params, "embed": table}}, TOKENS).hidden_BTD
            return jnp.sum(jnp.square(hidden))

        return flat(jax.jit(jax.grad(total))(table))

    wanted = gradient(make(), whole)
    for remat in ("none", "full"):
        found = gradient(dataclasses.replace(model, model=make(remat=remat)), params)
        for path, x in wanted.items():
            np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-5 * np.abs(x).max())
    again = model.quantised(whole, TOKENS)  # what is quantised stays what it is
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_no_kernel_is_kept_for_the_backward_pass():
    """Of a loop over layers that keeps all else: neither whole kernels nor copies of few bits."""
    model = quantized(model=small_llama(), kind="int8", block=16)
    params = params_of(model, TOKENS)

    def total(table):
        hidden = model.apply({"params": {**params, "embed": table}}, TOKENS).hidden_BTD
        return jnp.sum(jnp.square(hidden))

    jaxpr = jax.make_jaxpr(jax.grad(total))(params["embed"])
    first = next(e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
    kernels = {x.shape for path, x in flat(model.plain(params, TOKENS)).items() if "blocks" in path}
    kernels = {shape for shape in kernels if len(shape) > 2}
    assert kernels and not kernels & {v.aval.shape for v in first.outvars}


def batches(count=3):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, 61, (8, 13))
        yield {
            "tokens": tokens[:, :-1].astype("i4"),
            "targets": tokens[:, 1:].astype("i4"),
            "weights": (rng.random((8, 12)) < 0.8).astype("f4"),
        }


def program_of(model, *, devices=1, layout=None, trainable="/lora/", **fields):
    example = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in next(batches()).items()}
    return compile_program(
        CausalLM(model=model),
        optax.sgd(0.3),
        layout or Layout(),
        example,
        batch_size=8,
        trainable=trainable,
        devices=jax.devices()[:devices],
        **fields,
    )


def trained(program, state, count=3):
    losses = []
    for batch in itertools.islice(batches(), count):
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(float(metrics["loss"].value))
    return losses, state


@pytest.mark.slow
def test_qlora_is_lora_on_what_the_weights_stand_for():
    base = quantized(model=small_llama(remat="full"), kind="nf4", block=16)
    program = program_of(adapted(model=base, adapters=(LORA,)))
    state = program.init()
    frozen = flat(jax.tree.map(np.array, state.frozen))
    on_plain = program_of(adapted(model=small_llama(), adapters=(LORA,)))
    other = on_plain.init()
    whole = base.plain(state.frozen, TOKENS)
    other = dataclasses.replace(other, frozen=jax.tree.map(jnp.array, whole))
    jax.tree.map(np.testing.assert_array_equal, other.params, state.params)
    one, state = trained(program, state)
    two, other = trained(on_plain, other)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for path, x in flat(other.params).items():
        np.testing.assert_allclose(flat(state.params)[path], x, atol=1e-6)
    for path, x in flat(state.frozen).items():
        np.testing.assert_array_equal(x, frozen[path])
    moments = jax.tree.leaves(state.opt_state)
    assert all(x.dtype != jnp.uint8 for x in moments)
    merged = adapted(model=base, adapters=(LORA,)).merged(state.variables()["params"], TOKENS)
    hidden = [
        m.apply({"params": p}, TOKENS).hidden_BTD
        for m, p in (
            (adapted(model=base, adapters=(LORA,)), state.variables()["params"]),
            (small_llama(), merged),
        )
    ]
    np.testing.assert_allclose(*hidden, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("int4", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("nf4", {"fsdp": 8}),
        ("int8", {"stage": 2, "tensor": 2, "context": 2}),
        ("fp8", {"data": 2, "tensor": 4}),
    ],
)
def test_eight_devices_are_one(kind, sizes):
    """Blocks of 16 of 48 hidden units: no number of devices divides their three scales."""
    base = llama(
        num_layers=2,
        dim=32,
        num_heads=4,
        num_kv_heads=4,
        vocab_size=61,
        vocab_multiple=8,
        max_length=32,
        hidden=48,
    )
    model = adapted(model=quantized(model=base, kind=kind, block=16), adapters=(LORA,))
    one = program_of(model)
    many = program_of(model, devices=8, layout=Layout(**sizes))
    losses = [trained(p, p.init())[0] for p in (one, many)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_training_refuses_what_has_no_gradient_and_counts_bytes():
    model = quantized(model=small_llama(), kind="int4", block=16)
    with pytest.raises(UserError, match=r"chooses blocks/.*quantised weights have no gradient"):
        program_of(model, trainable="")
    tuned = adapted(model=model, adapters=(LORA,))
    plain = adapted(model=small_llama(), adapters=(LORA,))
    precision = Precision(params="bfloat16_master")
    few, low, whole = (
        program_of(m, **f) for m, f in ((tuned, {}), (tuned, {"precision": precision}), (plain, {}))
    )
    kernels = sum(x.size for p, x in flat(drawn(small_llama())).items() if p.endswith("kernel"))
    saved = whole.memory["state and batch"] - few.memory["state and batch"]
    scales = sum(x.size for p, x in flat_shapes(few).items() if p.endswith("kernel_scale"))
    assert saved == kernels * 3.5 - 2 * scales
    for path, x in flat_shapes(low).items():
        assert "kernel_" not in path or x.dtype in (jnp.uint8, jnp.float16)
    # Other matrices are bfloat16 there: what is small against the loss is rounded to 8 bits.
    losses = trained(low, low.init())[0]
    np.testing.assert_allclose(losses, trained(few, few.init())[0], rtol=1e-4)


def flat_shapes(program):
    return paths_of(program.abstract_state.frozen)
