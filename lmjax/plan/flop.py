"""Matrix-product FLOP of a traced step, by part of the model: exact, and loops counted in full."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax.interpreters.partial_eval import dce_jaxpr

FORWARD, BACKWARD, RECOMPUTED = "forward", "backward", "recomputed"
_SCAFFOLD = {
    "rematted_computation", "checkpoint", "block", "blocks", "block.body", "while", "body",
}  # fmt: skip
_CAUSAL = 0.5


def executed(jaxpr: Any) -> dict[str, dict[str, float]]:
    """FLOP of all devices in one step: part -> {forward, backward, recomputed} -> FLOP.

    Counts the multiply-adds of products (two each) as the program does them: attention in full
    where it is not a kernel of its own, and what is computed again for the backward pass, but no
    product that nothing reads, which the compiler leaves out. The
    compiler's own count takes a loop's body once. A kernel counts by its own estimate or by its
    grid, and what it does on a condition half: the blocks that a causal mask leaves.
    """
    parts: dict[str, dict[str, float]] = {}
    program = _open(jaxpr)
    used, _ = dce_jaxpr(program, [True] * len(program.outvars), instantiate=True)
    for path, flop in _products(used, "", 1.0):
        when = FORWARD
        if "transpose(" in path:
            when = RECOMPUTED if "rematted_computation" in path else BACKWARD
        part = parts.setdefault(_part(path), dict.fromkeys((FORWARD, BACKWARD, RECOMPUTED), 0.0))
        part[when] += flop
    return parts


def _part(path: str) -> str:
    """'/transpose(jvp(DecoderLM))/blocks/block/attention/qkv/...' -> 'attention/qkv'."""
    names: list[str] = []
    for name in path.split("/"):
        if re.fullmatch(r"\w+\.\w+", name):
            continue  # a method of the module that was named before it
        if "jvp(" in name:
            names += re.findall(r"\w+(?=\))", name)[:1]
        elif "(" in name or "," in name or name == "shard_map":
            if names:
                break  # what the module calls: functions, kernels, einsums
        elif name and name not in _SCAFFOLD:
            names.append(name)
    return "/".join(names[1:][-2:]) or "logits"  # the loss makes them, outside of any module


def _products(
    jaxpr: Any, prefix: str, times: float, kernel: bool = False
) -> Iterator[tuple[str, float]]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        path = f"{prefix}/{equation.source_info.name_stack}"
        if (flop := _flop(name, params, equation)) is not None:
            yield path, times * flop
            continue
        inner = times
        if name == "scan":
            inner *= params["length"]
        if name == "pallas_call":
            inner *= math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        if name == "shard_map":  # its shapes are one device's
            mesh = params["mesh"]
            axes = params.get("manual_axes") or mesh.axis_names
            inner *= math.prod(mesh.shape[a] for a in axes)
        if name == "cond":
            branches = [list(_products(_open(b), path, inner, kernel)) for b in params["branches"]]
            most = max(branches, key=lambda found: sum(f for _, f in found))
            yield from ((p, f * _CAUSAL) for p, f in most) if kernel else most
            continue
        for called in subjaxprs(params):
            yield from _products(called, path, inner, kernel or name == "pallas_call")


def _flop(name: str, params: Mapping[str, Any], equation: Any) -> float | None:
    if name == "dot_general":
        ((contracted, _), (batch, _)) = params["dimension_numbers"]
        left, right = (v.aval for v in equation.invars[:2])
        summed = math.prod(left.shape[i] for i in contracted)
        shared = math.prod(left.shape[i] for i in batch)
        return 2.0 * left.size * right.size / (summed * shared)
    if name in ("ragged_dot", "ragged_dot_general"):
        return 2.0 * equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1]
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / features
    if name == "pallas_call":
        return getattr(params.get("cost_estimate"), "flops", None)
    if name.startswith("dot_product_attention_"):  # cuDNN's, [B, T, H, K]
        query, key = (v.aval for v in equation.invars[:2])
        products = 2 if "_fwd" in name else 5  # scores again, and four for the gradients
        causal = "CAUSAL" in str(params.get("mask_type"))
        return products * 2.0 * query.size * key.shape[1] * (_CAUSAL if causal else 1.0)
    return None


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def subjaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs within an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(item), "eqns"):
                yield _open(item)


def scans(jaxpr: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, equation) of every scan that is in no other scan's body but a microbatches' one."""
    for equation in _open(jaxpr).eqns:
        path = f"{prefix}/{equation.source_info.name_stack}"
        if equation.primitive.name == "scan" and equation.params["length"] > 1:
            yield path, equation
        if equation.primitive.name != "shard_map":
            for called in subjaxprs(equation.params):
                yield from scans(called, path)


def largest(jaxpr: Any, count: int, prefix: str = "") -> list[tuple[float, str, str]]:
    """(bytes over all devices, shape, path) of the largest arrays that the step makes."""
    found: dict[tuple[str, str], float] = {}
    todo = [(_open(jaxpr), prefix)]
    for program, above in todo:  # which grows
        for equation in program.eqns:
            path = f"{above}/{equation.source_info.name_stack}".strip("/")
            if equation.primitive.name != "shard_map":
                todo += [(called, path) for called in subjaxprs(equation.params)]
            for variable in equation.outvars:
                aval = variable.aval
                if getattr(aval, "shape", None):
                    size = float(aval.size) * getattr(aval.dtype, "itemsize", 4)
                    found[(aval.str_short(), _part(path))] = size
    rows = sorted(((size, *key) for key, size in found.items()), reverse=True)
    return rows[:count]
