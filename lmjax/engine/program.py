"""The compiled program of a run: one function for the launcher, notebooks, tests and the planner.

`compile_program` needs shapes only: no data is read and no parameter is made before it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax import sharding
from lmjax.core import Batch, Mean, Output, Spec, Task, Variables
from lmjax.engine import distributed
from lmjax.engine.guard import Guard
from lmjax.engine.precision import Precision, update
from lmjax.engine.state import TrainState, create_state
from lmjax.errors import UserError
from lmjax.ops import quantize
from lmjax.sharding import Layout

# XLA:CPU's default of 256 bits halves the speed of products on machines with AVX-512.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


@dataclass(frozen=True, kw_only=True)
class Program:
    """What `compile_program` returns.

    Args:
      mesh: the devices and their axes.
      abstract_state: shapes, dtypes and shardings of the state.
      init: makes the state of step 0, sharded as compiled.
      train_step: (state, batch) -> (state, metrics); the given state is consumed.
      eval_step: (variables, batch) -> metrics of the loss without training; compiled per shape.
      put: this process's rows of a global batch -> global arrays.
      memory: the compiler's account of bytes per device, by kind; empty where it gives none.
      compiled: the step's executable, for its text and its own accounts.
    """

    mesh: Mesh
    abstract_state: TrainState
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Mean]]]
    eval_step: Callable[[Variables, Batch], dict[str, Mean]]
    put: Callable[[Batch], Batch]
    memory: Mapping[str, int]
    compiled: Any


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A program that is traced for its mesh and not yet compiled, which takes a second or two.

    Args:
      mesh: the devices and their axes.
      abstract_state: shapes, dtypes and shardings of the state.
      abstract_batch: likewise, of a global batch.
      abstract_metrics: shapes of what the step reports.
      jaxpr: the step, of all devices together, as it is before partitioning.
      compile: makes the program; what the compiler raises, it raises.
    """

    mesh: Mesh
    abstract_state: TrainState
    abstract_batch: Batch
    abstract_metrics: Mapping[str, Mean]
    jaxpr: Any
    compile: Callable[[], Program]


def compile_program(*args: Any, **arguments: Any) -> Program:
    """Compiles the training step once, from abstract shapes: `draft_program`, compiled."""
    return draft_program(*args, **arguments).compile()


def draft_program(
    task: Task,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    example: Spec,
    *,
    batch_size: int,
    microbatches: int = 1,
    trainable: str = "",
    seed: int = 0,
    precision: Precision = Precision(),  # noqa: B008, as it is frozen
    guard: Guard = Guard(),  # noqa: B008
    devices: Sequence[jax.Device] | None = None,
) -> Draft:
    """Traces the training step, from abstract shapes.

    Args:
      task: the objective.
      optimizer: updates what trains.
      layout: devices per mesh axis.
      example: shapes and dtypes of one example.
      batch_size: examples per optimizer step, over all devices.
      microbatches: into how many parts a batch is cut to save memory; the gradient is the same.
      trainable: regex over parameter paths; "" trains all.
      seed: of initialisation and of each step's randomness.
      precision: of the parameters and of products with them.
      guard: which steps' updates are not applied.
      devices: by default all.

    Raises:
      UserError: where the layout does not divide the devices, the batch or a parameter; where the
        devices have no units for the products.
    """
    mesh = layout.mesh(devices)
    quantize.check_device(precision.products, mesh.devices.flat[0])
    rows_split = sharding.split_batch(batch_size, microbatches, mesh)
    make = functools.partial(
        _make_state, task, optimizer, example, trainable, seed, precision, guard
    )
    boxed = jax.eval_shape(make)
    shardings = sharding.shardings_of(boxed, mesh, also=[rows_split])
    abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        sharding.unbox(boxed),
        shardings,
    )
    rows = sharding.batch_sharding(mesh)
    abstract_batch = {
        k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype, sharding=rows)
        for k, v in example.items()
    }
    replicated = NamedSharding(mesh, PartitionSpec())
    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})

    products = functools.partial(quantize.products, precision.products, where=precision.quantized)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        with sharding.use(mesh, layout), products():
            return _train_step(
                task, optimizer, seed, microbatches, precision, guard, shardings, state, batch
            )

    traced = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)).trace(
        abstract_state, abstract_batch
    )

    @functools.partial(jax.jit, out_shardings=replicated, compiler_options=options)
    def evaluate(variables: Variables, batch: Batch) -> dict[str, Mean]:
        with sharding.use(mesh, layout), products():
            output = task.loss(variables, batch, jax.random.key(0), train=False)
            return {"loss": output.loss, **output.metrics}

    evaluations: dict[Any, Any] = {}

    def eval_step(variables: Variables, batch: Batch) -> dict[str, Mean]:
        leaves, structure = jax.tree.flatten((variables, batch))
        shapes = structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        if shapes not in evaluations:
            evaluations[shapes] = evaluate.lower(variables, batch).compile()
            distributed.barrier()  # see there
        found: dict[str, Mean] = evaluations[shapes](variables, batch)
        return found

    def compile_step() -> Program:
        compiled = traced.lower().compile(compiler_options=options)

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
            if state.step.is_deleted():
                raise ValueError(
                    "this state was consumed by an earlier train_step: keep the returned one."
                )
            try:
                return compiled(state, batch)
            except (TypeError, ValueError) as error:
                changed = differences((abstract_state, abstract_batch), (state, batch))
                if not changed:
                    raise
                raise UserError(
                    "the training step is compiled once, and was called with other arrays:\n  "
                    + "\n  ".join(changed)
                ) from error

        return Program(
            mesh=mesh,
            abstract_state=abstract_state,
            init=jax.jit(
                lambda: sharding.unbox(make()), out_shardings=shardings, compiler_options=options
            ),
            train_step=train_step,
            eval_step=eval_step,
            put=functools.partial(_put, rows),
            memory=_memory(compiled),
            compiled=compiled,
        )

    return Draft(
        mesh=mesh,
        abstract_state=abstract_state,
        abstract_batch=abstract_batch,
        abstract_metrics=traced.out_info[1],
        jaxpr=traced.jaxpr,
        compile=compile_step,
    )


def differences(expected: Any, given: Any) -> list[str]:
    """Says, leaf by leaf, which shape, dtype or sharding of `given` is not the expected one."""

    def describe(x: Any) -> dict[str, Any]:
        return {
            "shape": x.shape,
            "dtype": x.dtype,
            "sharding": getattr(x, "sharding", "host memory"),
        }

    def flat(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): describe(x) for p, x in leaves}

    old, new = flat(expected), flat(given)
    lines = [f"{name}: missing" for name in old if name not in new]
    lines += [f"{name}: unexpected" for name in new if name not in old]
    for name in old.keys() & new.keys():
        for what, value in old[name].items():
            other = new[name][what]
            same = (
                value.is_equivalent_to(other, len(old[name]["shape"]))
                if what == "sharding" and isinstance(other, jax.sharding.Sharding)
                else value == other
            )
            if not same:
                lines.append(f"{name}: {what} {other}, compiled for {value}")
    return sorted(lines)


def _rngs(seed: int) -> tuple[jax.Array, jax.Array]:
    """(of initialisation, of the steps)."""
    init, steps = jax.random.split(jax.random.key(seed))
    return init, steps


def _make_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    example: Spec,
    trainable: str,
    seed: int,
    precision: Precision,
    guard: Guard,
) -> TrainState:
    batch = {k: jnp.zeros((1, *v.shape), v.dtype) for k, v in example.items()}
    rng = _rngs(seed)[0]
    return create_state(
        task, optimizer, batch, trainable=trainable, rng=rng, precision=precision, guard=guard
    )


def _train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    microbatches: int,
    precision: Precision,
    guard: Guard,
    shardings: TrainState,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Mean]]:
    rng = jax.random.fold_in(_rngs(seed)[1], state.step)
    gradient, output = _gradient(task, microbatches, shardings, state, batch, rng)
    params, opt_state = update(precision, optimizer, gradient, state.params, state.opt_state, rng)
    norm = optax.tree.norm(gradient)
    applied, bad, memory = guard.judge(state.guard, output.loss.value, norm)
    metrics = {"loss": output.loss, **output.metrics, "grad_norm": Mean.of(norm)}
    metrics["bad"] = Mean.of(bad.astype(jnp.float32))
    rate = optax.tree_utils.tree_get(opt_state, "learning_rate")
    if rate is not None:
        metrics["learning_rate"] = Mean.of(jnp.asarray(rate))
    updated = replace(
        state,
        params=params,
        model_state={**state.model_state, **output.model_state},
        opt_state=opt_state,
    )
    kept = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
    return replace(kept, step=state.step + 1, guard=memory), metrics


def _gradient(
    task: Task,
    microbatches: int,
    shardings: TrainState,
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
) -> tuple[Any, Output]:
    """The gradient of the batch's mean loss, and the batch's summed output.

    Slices sum their own gradients first, over devices that fast links join and over microbatches;
    the slow network then carries one sum of what each device holds. (Dropout differs from slice to
    slice, and so from the dropout of another number of slices.)
    """
    sums = functools.partial(_sums, task, microbatches, shardings.params, state)
    slices = sharding.axis_size("slices")
    if slices == 1 or state.model_state:
        gradient, output = sums(batch, rng)
    else:
        rows = {k: x.reshape(slices, -1, *x.shape[1:]) for k, x in batch.items()}
        rngs = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(slices))
        with sharding.mapped("slices"):
            by_slice = jax.vmap(sums, spmd_axis_name="slices")(rows, rngs)
        gradient, output = jax.tree.map(lambda x: jnp.sum(x, axis=0), by_slice)
    return jax.tree.map(lambda g: g / output.loss.weight, gradient), output


def _sums(
    task: Task, microbatches: int, shardings: Any, state: TrainState, batch: Batch, rng: jax.Array
) -> tuple[Any, Output]:
    """The gradient of the batch's total loss, and its output, microbatch after microbatch."""

    def total(params: Any, model_state: Any, part: Batch, key: jax.Array) -> tuple[Any, Output]:
        variables = replace(state, model_state=model_state).variables(params)
        output = task.loss(variables, part, key, train=True)
        return output.loss.total, output

    def gradient_of(*args: Any) -> tuple[Any, Output]:
        gradient, output = jax.grad(total, has_aux=True)(*args)
        return jax.lax.with_sharding_constraint(gradient, shardings), output

    if microbatches == 1:
        return gradient_of(state.params, state.model_state, batch, rng)
    # Rows i, i + m, ... make microbatch i of m: each device then cuts its own rows; none move.
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), dict(batch)
    )

    def accumulate(carry: tuple[Any, Output], xs: tuple[Any, Batch]) -> tuple[Any, None]:
        index, part = xs
        gradient, total = carry
        key = jax.random.fold_in(rng, index)
        more, output = gradient_of(state.params, total.model_state, part, key)
        loss, metrics = jax.tree.map(
            jnp.add, (total.loss, total.metrics), (output.loss, output.metrics)
        )
        summed = Output(loss=loss, metrics=metrics, model_state=output.model_state)
        return (jax.tree.map(jnp.add, gradient, more), summed), None

    shapes = jax.eval_shape(
        gradient_of, state.params, state.model_state, jax.tree.map(lambda x: x[0], parts), rng
    )
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes[0])
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
    start = (nothing, replace(empty, model_state=state.model_state))
    return jax.lax.scan(accumulate, start, (jnp.arange(microbatches), parts))[0]


def _put(rows: NamedSharding, batch: Batch) -> Batch:
    if jax.process_count() == 1:
        ways = sharding.batch_ways(rows.mesh)
        if bad := [k for k, v in batch.items() if len(v) % ways]:
            raise UserError(
                f"{len(batch[bad[0]])} rows do not divide into {ways} data-parallel parts: make "
                f"the batch_size a multiple of {ways}."
            )
        return jax.device_put(dict(batch), rows)
    return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}


def _memory(compiled: Any) -> dict[str, int]:
    """Bytes per device: what the step is given and keeps, and what it needs beside at its peak."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    state_and_batch = int(analysis.argument_size_in_bytes)
    extra = int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return {
        "state and batch": state_and_batch,
        "temporaries": int(analysis.temp_size_in_bytes) + max(extra, 0),
    }
