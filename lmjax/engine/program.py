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
from lmjax.core import Batch, Mean, Predicts, Spec, Task, Variables
from lmjax.engine import distributed
from lmjax.engine.gradient import gradient_of
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
      predict: (variables, batch) -> what the task says of each row, whole everywhere; likewise.
      put: this process's rows of a global batch -> global arrays.
      memory: the compiler's account of bytes per device, by kind; empty where it gives none.
      compiled: the step's executable, for its text and its own accounts.
    """

    mesh: Mesh
    abstract_state: TrainState
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Mean]]]
    eval_step: Callable[[Variables, Batch], dict[str, Mean]]
    predict: Callable[[Variables, Batch], dict[str, jax.Array]]
    put: Callable[[Batch], Batch]
    memory: Mapping[str, int]
    compiled: Any


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What reads variables and changes none: `eval_step`, `predict` and `put` of a `Program`."""

    eval_step: Callable[[Variables, Batch], dict[str, Mean]]
    predict: Callable[[Variables, Batch], dict[str, jax.Array]]
    put: Callable[[Batch], Batch]


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
    guard: Guard = Guard(),  # noqa: B008, likewise
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
        _make_state, task, optimizer, example, batch_size, trainable, seed, precision, guard
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

    reading = reading_of(task, mesh, layout, precision)

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
            eval_step=reading.eval_step,
            predict=reading.predict,
            put=reading.put,
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


def reading_of(task: Task, mesh: Mesh, layout: Layout, precision: Precision) -> Reading:
    """What reads the variables of a task on a mesh; compiled when it is called, per shape."""
    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})
    products = functools.partial(quantize.products, precision.products, where=precision.quantized)

    def evaluate(variables: Variables, batch: Batch) -> dict[str, Mean]:
        with sharding.use(mesh, layout), products():
            output = task.loss(variables, batch, jax.random.key(0), train=False)
            return {"loss": output.loss, **output.metrics}

    def predict(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        if not isinstance(task, Predicts):
            raise UserError(f"{type(task).__name__} says nothing of single rows (no `predict`).")
        with sharding.use(mesh, layout), products():
            return task.predict(variables, batch)

    replicated = NamedSharding(mesh, PartitionSpec())
    whole = functools.partial(jax.jit, out_shardings=replicated, compiler_options=options)
    return Reading(
        eval_step=_by_shapes(whole(evaluate)),
        predict=_by_shapes(whole(predict)),
        put=functools.partial(_put, sharding.batch_sharding(mesh)),
    )


def _by_shapes(function: Any) -> Callable[..., Any]:
    """A jitted function that is compiled once for each set of shapes, on all processes together."""
    compiled: dict[Any, Any] = {}

    def call(variables: Variables, batch: Batch) -> Any:
        leaves, structure = jax.tree.flatten((variables, batch))
        shapes = structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        if shapes not in compiled:
            compiled[shapes] = function.lower(variables, batch).compile()
            distributed.barrier()  # see there
        return compiled[shapes](variables, batch)

    return call


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
    batch_size: int,
    trainable: str,
    seed: int,
    precision: Precision,
    guard: Guard,
) -> TrainState:
    batch = {k: jnp.zeros((1, *v.shape), v.dtype) for k, v in example.items()}
    rng = _rngs(seed)[0]
    return create_state(
        task,
        optimizer,
        batch,
        batch_size=batch_size,
        trainable=trainable,
        rng=rng,
        precision=precision,
        guard=guard,
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
    gradient, output = gradient_of(task, microbatches, shardings, state, batch, rng)
    params, opt_state = update(precision, optimizer, gradient, state.params, state.opt_state, rng)
    norm = optax.tree.norm(gradient)
    applied, bad, memory = guard.judge(state.guard, output.loss.value, norm)
    metrics = {"loss": output.loss, **output.metrics, "grad_norm": Mean.of(norm)}
    metrics["bad"] = Mean.of(bad.astype(jnp.float32))
    rates = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    for i, (_, rate) in enumerate(rates):  # several, where groups of parameters have their own
        metrics[f"learning_rate_{i + 1}" if i else "learning_rate"] = Mean.of(jnp.asarray(rate))
    updated = replace(
        state,
        params=params,
        model_state={**state.model_state, **output.model_state},
        opt_state=opt_state,
    )
    kept = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
    return replace(kept, step=state.step + 1, guard=memory), metrics


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
