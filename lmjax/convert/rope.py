"""Rotary settings as config.json spells them, `rope_theta` and `rope_scaling`, both ways.

Newer files have both in one field, `rope_parameters`; what is written is the older spelling, which
both generations of transformers read.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from lmjax.config import call
from lmjax.convert.settings import Settings
from lmjax.errors import UserError, did_you_mean
from lmjax.ops.rope import LinearScaling, Rope, RopeScaling, Scaling, YarnScaling


def theta(settings: Settings, default: float) -> float:
    """The base of the frequencies."""
    older = settings.number("rope_theta", default)
    return settings.part("rope_parameters").number("rope_theta", older)


def recorded_scaling(settings: Settings) -> ConfigDict | None:
    """The recorded change of the frequencies; raises UserError for a kind that we lack."""
    older, newer = settings.part("rope_scaling"), settings.part("rope_parameters")
    return scaling_of(older if older.fields else newer, settings)


def scaling_of(given: Settings, settings: Settings) -> ConfigDict | None:
    """The same of the fields `given`, of the model of `settings`."""
    given.require("partial_rotary_factor", 1.0, None)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        return call(
            RopeScaling,
            factor=given.number("factor"),
            low_freq_factor=given.number("low_freq_factor"),
            high_freq_factor=given.number("high_freq_factor"),
            original_length=given.integer("original_max_position_embeddings"),
        )
    if kind == "linear":
        return call(LinearScaling, factor=given.number("factor"))
    if kind == "yarn":
        optional = {
            name: given.number(name)
            for name in ("attention_factor", "mscale", "mscale_all_dim")
            if given.get(name) is not None
        }
        length = settings.get("max_position_embeddings")
        return call(
            YarnScaling,
            factor=given.number("factor"),
            original_length=given.integer("original_max_position_embeddings", length),
            beta_fast=given.number("beta_fast", 32.0),
            beta_slow=given.number("beta_slow", 1.0),
            truncate=given.boolean("truncate", True),
            **optional,
        )
    known = ("default", "linear", "llama3", "yarn")
    if kind in ("dynamic", "longrope", "su"):
        raise UserError(
            f"{given.source}: rope_type is {kind!r}, a rotation that changes with the length of "
            "the text, so that what is cached of its beginning would no longer fit; lmjax has "
            f"{', '.join(known)}. {_INSTEAD[kind == 'dynamic']}"
        )
    raise UserError(
        f"{given.source}: rope_type is {kind!r}, which lmjax does not have."
        + did_you_mean(str(kind), known)
    )


_INSTEAD = (
    "Take a model that was trained with one of these.",
    "Up to max_position_embeddings tokens it is the plain one: take it out, if those are enough.",
)


def fields(rope: Rope) -> dict[str, Any]:
    """The two fields of config.json."""
    return {"rope_theta": rope.theta, "rope_scaling": _scaling(rope.scaling)}


def parameters(rope: Rope) -> dict[str, Any]:
    """The newer field."""
    return {"rope_theta": rope.theta, **(_scaling(rope.scaling) or {"rope_type": "default"})}


def _scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, RopeScaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    found = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    given = {name: getattr(scaling, name) for name in optional}
    return found | {name: value for name, value in given.items() if value is not None}
