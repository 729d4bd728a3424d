"""Starting from the parameters of another run, by regex; optimizer, step and data begin anew."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from lmjax import sharding
from lmjax.core import ASIDE, Batch, Variables
from lmjax.engine import distributed, manifest
from lmjax.engine.manifest import Damaged
from lmjax.engine.program import COMPILER_OPTIONS, Draft, Program
from lmjax.engine.state import TrainState, create_state, merge, paths_of
from lmjax.engine.stored import Stored, find, variables
from lmjax.errors import UserError, check_regex
from lmjax.sharding import Boxed

if TYPE_CHECKING:
    from lmjax.engine.run import Run

log = logging.getLogger("lmjax")

_LISTED = 12  # of each kind of parameters, at most
_VOCABULARY = r"embed/table$"  # paths of what has a row for each token


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Which parameters a run starts with, of a checkpoint or 'hf:DIR'; the others are initialised.

    The averaged parameters are taken where the checkpoint has them. A resumed run goes on from its
    own checkpoints, and never comes to this.

    Args:
      path: a workdir, its `checkpoints` folder or one checkpoint; or 'hf:DIR', a folder of Hugging
        Face's.
      step: which of its checkpoints; 0 for the newest.
      load: regex over this run's parameter paths ('blocks/mlp/up/kernel'): those in which it is
        found are loaded.
      rename: (regex, replacement) pairs: the first whose regex is found in this run's path gives,
        by `re.sub`, the path in the checkpoint; without one the paths are the same.
      strict: whether what `load` chooses and the checkpoint lacks is an error; else it is
        initialised.
    """

    path: str
    step: int = 0
    load: str = ""
    rename: Sequence[tuple[str, str]] = ()
    strict: bool = True

    def __post_init__(self) -> None:
        if not self.path or self.step < 0:
            raise UserError(
                f"init_from has path {self.path!r} and step {self.step}: name a workdir or a "
                "checkpoint, and one of its steps, or 0 for the newest."
            )
        check_regex("init_from.load", self.load)
        for pattern, _ in self.rename:
            check_regex("init_from.rename", pattern)

    def source(self, path: str) -> str:
        """The path in the checkpoint of a parameter of this run."""
        for pattern, replacement in self.rename:
            if re.search(pattern, path):
                return re.sub(pattern, replacement, path)
        return path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of every parameter, by this run's path.

    Args:
      loaded: path -> the array's path in the checkpoint; those that are reshaped, too.
      reshaped: path -> (the checkpoint's shape, this run's), which of a table of the vocabulary
        may have more rows.
      left: what is initialised.
      unused: the checkpoint's parameters that nothing takes.
    """

    loaded: Mapping[str, str]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    left: Sequence[str]
    unused: Sequence[str]

    def report(self) -> str:
        """The plan in words, a line for each kind."""
        shapes = [f"{p} {list(a)} as {list(b)}" for p, (a, b) in self.reshaped.items()]
        rows = [f"{len(self.loaded)} parameters are loaded"]
        for what, names in (
            ("reshaped", shapes),
            ("left as initialised", self.left),
            ("in the checkpoint and not used", self.unused),
        ):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                rows.append(f"{len(names)} {what}: {', '.join(names[:_LISTED])}{more}")
        return "\n  ".join(rows)


def plan(warm: WarmStart, params: Mapping[str, Any], saved: Mapping[str, Any]) -> Plan:
    """Joins this run's parameters (path -> shape) with those of a checkpoint's manifest.

    Raises:
      UserError: where nothing is loaded, where sizes differ, where a strict start finds nothing.
    """
    lie = {
        name.removeprefix("params/"): path
        for name, path in variables(saved["arrays"]).items()
        if name.startswith("params/")
    }
    chosen = [path for path in params if re.search(warm.load, path)]
    found = {path: lie[warm.source(path)] for path in chosen if warm.source(path) in lie}
    missing = [path for path in chosen if path not in found]
    if missing and (warm.strict or not found):
        wanted = [p if p == warm.source(p) else f"{p} (as {warm.source(p)})" for p in missing]
        raise UserError(
            f"init_from: {warm.path} has no {_some(wanted)}; it has {_some(list(lie))}. Leave them "
            "out by init_from.load, give their names there by init_from.rename, or have them "
            "initialised with init_from.strict=False."
        )
    if not chosen:
        raise UserError(
            f"init_from.load={warm.load!r} matches no parameter. There are: {_some(list(params))}."
        )
    reshaped, wrong = {}, []
    for path, source in found.items():
        has, wants = tuple(saved["arrays"][source]["shape"]), tuple(params[path].shape)
        grows = re.search(_VOCABULARY, path) and has[1:] == wants[1:] and has[:1] < wants[:1]
        if math.prod(has) != math.prod(wants) and not grows:
            wrong.append(f"{path} is {list(wants)}, and {source} of the checkpoint {list(has)}")
        elif has != wants:
            reshaped[path] = (has, wants)
    if wrong:
        raise UserError(
            f"init_from: {warm.path} has other sizes: {_some(wrong)}. Make the model the same "
            "(of a table the rows, by vocab_size and vocab_multiple), or leave these out by "
            "init_from.load."
        )
    taken = {warm.source(path) for path in found}
    return Plan(
        loaded=found,
        reshaped=reshaped,
        left=[path for path in params if path not in found],
        unused=[path for path in lie if path not in taken],
    )


class Source(Protocol):
    """Weights of another library as a checkpoint is read: `engine.stored.Stored` in small.

    Its manifest has `step`, `tokenizer` (None where it is not known) and `arrays`, whose paths
    begin with 'params/', and which need no checksums.
    """

    @property
    def folder(self) -> Path:
        """Where they lie."""
        ...

    def manifest(self) -> Mapping[str, Any]:
        """What they are."""
        ...

    def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by path, with the shapes, dtypes and shardings of `wanted`."""
        ...


# By scheme, 'hf' of 'hf:DIR': (what follows it, the shapes of this run's parameters) -> Source.
Loaders = Mapping[str, Callable[[str, Mapping[str, tuple[int, ...]]], Source]]


# What `Run.init_from` may be: a path, what to take from it, or several of these, one after another.
Starts = str | WarmStart | Sequence[WarmStart]


def start(
    warm: Starts, run: Run, program: Program | Draft, loaders: Loaders | None = None
) -> TrainState:
    """The state of step 0 with the parameters that `warm` names, read straight to their devices.

    What it does not name, and all of the optimizer, is as `program.init()` makes it, the averages
    and master bits of the optimizer from the loaded parameters. Says what was done with each.

    Args:
      warm: a path, or what to take from it; of several, each says by `load` which parameters.
      run: that starts.
      program: its program.
      loaders: read what else a path may name, by its scheme.

    Raises:
      UserError: where there is no such checkpoint, it is damaged, or does not fit; where two of
        several load the same parameter.
    """
    if isinstance(warm, str):
        warm = WarmStart(path=warm)
    starts = [warm] if isinstance(warm, WarmStart) else list(warm)
    targets = paths_of(merge(program.abstract_state.params, program.abstract_state.frozen))
    opened = []
    for one in starts:
        stored = _open(one, targets, loaders)
        with _undamaged(stored):
            saved = stored.manifest()
        opened.append((one, stored, saved, plan(one, targets, saved)))
    _check_once([(one, chosen) for one, _, _, chosen in opened])
    loaded = {path for *_, chosen in opened for path in chosen.loaded}
    left = [path for path in targets if path not in loaded]
    arrays: dict[str, jax.Array] = {}
    for one, stored, saved, chosen in opened:
        with _undamaged(stored):
            arrays |= _read(stored, saved, chosen, targets, program)
        said = replace(chosen, left=left if one is starts[-1] else ())
        log.info("start from %s, step %d:\n  %s", stored.folder, saved["step"], said.report())
        _check_fitted(one, chosen, saved, run)
    exact = {
        path: x
        for path, x in arrays.items()
        if (x.shape, x.dtype) == (targets[path].shape, targets[path].dtype)
    }
    others = {path: x for path, x in arrays.items() if path not in exact}

    def make(consumed: Mapping[str, jax.Array], kept: Mapping[str, jax.Array]) -> Any:
        task: Any = _Loaded(run.task, {**consumed, **kept})
        batch = {k: jnp.zeros((1, *v.shape), v.dtype) for k, v in run.data.example.items()}
        state = create_state(
            task,
            run.optimizer,
            batch,
            batch_size=run.batch_size,
            trainable=run.trainable,
            rng=jax.random.split(jax.random.key(run.seed))[0],
            precision=run.precision,
            guard=run.guard,
        )
        return sharding.unbox(state)

    made = jax.jit(
        make,
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda x: x.sharding, program.abstract_state),
        compiler_options=COMPILER_OPTIONS.get(program.mesh.devices.flat[0].platform, {}),
    )
    compiled = made.lower(exact, others).compile()
    distributed.barrier()
    state: TrainState = compiled(exact, others)
    return state


def _open(warm: WarmStart, targets: Mapping[str, Any], loaders: Loaders | None) -> Stored | Source:
    """What the path names."""
    scheme, _, rest = warm.path.partition(":")
    if loaders and scheme in loaders:
        return loaders[scheme](rest, {path: tuple(x.shape) for path, x in targets.items()})
    return find(warm.path, warm.step or None)[-1]


@contextlib.contextmanager
def _undamaged(stored: Stored | Source) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise UserError(
            f"init_from: the checkpoint {stored.folder} is damaged: {error}. Give another one."
        ) from error


def _check_once(plans: Sequence[tuple[WarmStart, Plan]]) -> None:
    """Raises UserError where two starts load the same parameter."""
    by: dict[str, WarmStart] = {}
    for warm, chosen in plans:
        if twice := [path for path in chosen.loaded if path in by]:
            raise UserError(
                f"init_from loads {_some(twice)} twice, from {by[twice[0]].path} and from "
                f"{warm.path}: let `load` of one of them leave it out."
            )
        by |= dict.fromkeys(chosen.loaded, warm)


def _check_fitted(warm: WarmStart, chosen: Plan, saved: Mapping[str, Any], run: Run) -> None:
    """Warns where the numbers of the data mean another thing; of frozen models it is an error."""
    for name, text in run.data.fitted.items():
        if saved.get(name) in (None, text):
            continue
        if aside := [path for path in chosen.loaded if path.startswith(f"{ASIDE}/")]:
            raise UserError(
                f"init_from: the {name} of {warm.path} is another than this run's data has: what "
                f"{aside[0].split('/')[1]} says of a token would be said of another one. Give this "
                f"run the {name} of that one (text: vocabulary=Pretrained(path={warm.path!r}))."
            )
        log.warning("its %s is another than this run's: the same numbers mean another", name)


@dataclass(frozen=True)
class _Loaded:
    """A task that initialises some of its parameters with given values."""

    task: Any
    values: Mapping[str, jax.Array]

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        variables = dict(self.task.init(rng, batch))
        params = paths_of(variables["params"])
        for path, value in self.values.items():
            old = params[path]
            boxed = isinstance(old, Boxed)
            like = old.value if boxed else old
            if value.size == like.size:
                new = value.reshape(like.shape).astype(like.dtype)
            else:  # rows that the checkpoint's table lacks are initialised
                new = like.at[: len(value)].set(value.astype(like.dtype))
            params[path] = old.replace_boxed(new) if boxed else new
        return {**variables, "params": unflatten_dict(params, sep="/")}


def _read(
    stored: Stored | Source,
    saved: Mapping[str, Any],
    chosen: Plan,
    targets: Mapping[str, Any],
    program: Program | Draft,
) -> dict[str, jax.Array]:
    """The arrays that are loaded, by this run's paths, in the checkpoint's shapes and dtypes."""
    mesh, wanted = program.mesh, {}
    for path, source in chosen.loaded.items():
        shape = saved["arrays"][source]["shape"]
        whole = NamedSharding(mesh, _even(shape, mesh.size, mesh.axis_names))
        where = whole if path in chosen.reshaped else targets[path].sharding
        wanted[source] = manifest.abstract(saved, source, where)
    reason = ""
    try:
        found = stored.read(wanted)
    except Damaged as error:
        reason = str(error)
    if reasons := [text for text in distributed.exchange(reason) if text]:
        raise Damaged(reasons[0])
    if isinstance(stored, Stored) and (bad := manifest.damaged(saved, found)):
        raise Damaged(f"not what was saved, by their checksums: {_some(bad)}")
    return {path: found[source] for path, source in chosen.loaded.items()}


def _even(shape: Sequence[int], parts: int, axes: tuple[str, ...]) -> PartitionSpec:
    """Splits the first axis that so many devices divide over all of them; none if there is none."""
    axis = next((i for i, n in enumerate(shape) if n % parts == 0), None)
    return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, axes)


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
