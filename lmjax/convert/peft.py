"""Adapters as the library peft keeps them: a folder with adapter_config.json and its tensors.

Source: `peft` 0.21, `LoraConfig`, `AdaLoraConfig`, `IA3Config` and the tensors that
`save_pretrained` writes. Where a product's adapter lies in our arrays: `convert.places`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmjax.adapt.adalora import AdaLora
from lmjax.adapt.adapted import Adapted, Adapter
from lmjax.adapt.ia3 import Ia3
from lmjax.adapt.lora import Lora
from lmjax.adapt.sites import named
from lmjax.convert.places import EXAMPLE, Place
from lmjax.convert.settings import Settings
from lmjax.convert.shards import Out, read_file, write_file
from lmjax.engine.stored import Stored
from lmjax.errors import UserError

CONFIG, TENSORS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "lmjax.json"
PREFIX = "base_model.model."
SAMPLED = 4096  # elements of each kernel that tell one base from another

# What we do not compute, by the field of adapter_config.json: the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


def read_adapter(
    folder: Path, places: Mapping[str, Place], kernel: Callable[[str], np.ndarray]
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The adapter of a folder and its arrays by our paths, for a model with these products.

    Args:
      folder: as `save_pretrained` writes it.
      places: see `places_of`.
      kernel: path of a product -> the base's kernel; asked for where magnitudes are relative to it.

    Raises:
      UserError: where files are missing or damaged, for a kind or field that we do not compute, for
        a product that the model has not, for tensors that are missing, too many or of other shapes.
    """
    settings = Settings.read(folder / CONFIG)
    kind = settings.get("peft_type", "")
    if kind not in ("LORA", "ADALORA", "IA3"):
        raise UserError(
            f"{settings.source}: peft_type is {kind!r}, and LORA, ADALORA and IA3 can be imported."
        )
    for name, plain in _PLAIN.items():
        if name in settings.fields and settings.fields[name] not in plain:
            raise UserError(
                f"{settings.source}: {name} is {settings.fields[name]!r}, which lmjax does not "
                f"compute: only {plain[0]!r} can be imported."
            )
    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder} has no {TENSORS}: save it by model.save_pretrained(DIR).")
    tensors: dict[str, np.ndarray] = {}
    for name, held in read_file(folder / TENSORS).items():
        rows = held.shape[0] if held.shape else 1
        plain_name = name.removeprefix(PREFIX).removesuffix(".weight")
        tensors[plain_name] = held.rows(0, rows).astype(np.float32)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    if unknown := [module for module in modules if module not in places]:
        some = ", ".join(list(places)[:4])
        raise UserError(
            f"{folder} adapts {unknown[0]!r}, and the base has no such product: it is an adapter "
            f"of another base. This one has {some}, ..."
        )
    adapter, wanted = _adapter(kind, settings, [places[module] for module in modules])
    arrays: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    target: dict[str, str] = {}
    for module in modules:
        place = places[module]
        for theirs, ours, side in wanted:
            if (tensor := tensors.pop(f"{module}.{theirs}", None)) is None:
                raise UserError(f"{folder / TENSORS} lacks {PREFIX}{module}.{theirs}.")
            path = f"{place.path}/{adapter.name}/{named(place.part, ours)}"
            target[path] = _target(place)
            side = _side(adapter, place) if side == "factor" else side
            array = _checked(folder, place, tensor, ours, side)
            if ours == "magnitude":
                array = array - place.norms(kernel(place.path))
            arrays.setdefault(path, {})[place.at] = array
    if tensors:
        raise UserError(f"{folder / TENSORS} has {next(iter(tensors))}, which nothing reads.")
    wanted_at: dict[str, set[Any]] = {}
    for place in places.values():
        wanted_at.setdefault(_target(place), set()).add(place.at)
    return adapter, {
        path: _stacked(folder, path, layers, wanted_at[target[path]])
        for path, layers in arrays.items()
    }


def _adapter(
    kind: str, settings: Settings, places: Sequence[Place]
) -> tuple[Adapter, list[tuple[str, str, str]]]:
    """An adapter, and its tensors: (name there, name here, what its axes are)."""
    targets = tuple(dict.fromkeys(_target(place) for place in places))
    low_rank = [("lora_A", "a", "a"), ("lora_B", "b", "b")]
    if kind == "IA3":
        forward = settings.get("feedforward_modules", [])
        inputs = [_target(p) for p in places if _ends(p.module, forward)]
        return Ia3(targets=targets, inputs=tuple(dict.fromkeys(inputs))), [
            ("ia3_l", "factor", "factor")
        ]
    rank = settings.integer("init_r" if kind == "ADALORA" else "r")
    alpha, dropout = settings.number("lora_alpha", 8), settings.number("lora_dropout", 0.0)
    if kind == "ADALORA":
        adapter: Adapter = AdaLora(targets=targets, rank=rank, alpha=alpha, dropout=dropout)
        return adapter, [*low_rank, ("lora_E", "values", "values")]
    dora = settings.boolean("use_dora", False)
    rslora = settings.boolean("use_rslora", False)
    lora = Lora(
        targets=targets,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        scaling="rslora" if rslora else "lora",
        dora=dora,
    )
    magnitude = [("lora_magnitude_vector", "magnitude", "outputs")] if dora else []
    return lora, [*low_rank, *magnitude]


def _checked(folder: Path, place: Place, tensor: np.ndarray, name: str, side: str) -> np.ndarray:
    """One layer's array of ours; raises UserError where the tensor has another size."""
    outs, ins = place.table.shape
    rank = tensor.shape[0] if side in ("a", "values") else tensor.shape[-1]
    size = {"a": rank * ins, "b": rank * outs, "outputs": outs, "inputs": ins, "values": rank}
    if tensor.size != size[side] or (side in ("a", "b") and tensor.ndim != 2):
        raise UserError(
            f"{folder / TENSORS}: {place.module} has a tensor {name} of shape "
            f"{list(tensor.shape)}, and the product is {ins} x {outs} here: it is an adapter of "
            "another base."
        )
    return tensor.reshape(-1) if side == "values" else place.ours(tensor, side)


def _stacked(
    folder: Path, path: str, layers: Mapping[tuple[int, ...], np.ndarray], wanted: set[Any]
) -> np.ndarray:
    """Layers as one array; raises UserError where some are missing."""
    if layers.keys() != wanted:
        raise UserError(f"{folder} adapts some layers and not others at {path}: that has no place.")
    return layers[()] if () in layers else np.stack([layers[at] for at in sorted(layers)])


def write_adapter(
    to: Path,
    model: Adapted,
    params: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    *,
    causal: bool,
    base: str = "",
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, to)` loads.

    Args:
      to: the folder.
      model: with one adapter.
      params: all by path.
      places: products of the model.
      causal: whether it is a decoder's.
      base: its fingerprint, see `fingerprint`.

    Raises:
      UserError: for several adapters, and for a kind or a product that peft does not know.
    """
    if len(model.adapters) != 1:
        raise UserError("the model has several adapters, and a folder holds one: merge them.")
    (adapter,) = model.adapters
    if not isinstance(adapter, Lora | AdaLora | Ia3):
        kind = type(adapter).__name__
        raise UserError(f"{kind} is no adapter that peft knows: it stays in its workdir.")
    tuned = model.sites(EXAMPLE)[adapter.name]
    found: dict[str, np.ndarray] = {}
    modules, inputs = [], []
    names = {name for site in tuned.values() for name in site.names()}
    for place in places.values():
        if _target(place) not in names:
            continue
        at = f"{place.path}/{adapter.name}"

        def own(name: str, at: str = at, place: Place = place) -> np.ndarray:
            return np.asarray(params[f"{at}/{named(place.part, name)}"][place.at], np.float32)

        module = PREFIX + place.module
        modules.append(place.module)
        if isinstance(adapter, Ia3):
            side = _side(adapter, place)
            vector = place.theirs(own("factor"), side)
            found[f"{module}.ia3_l"] = vector.reshape((1, -1) if side == "inputs" else (-1, 1))
            inputs += [place.module] if side == "inputs" else []
            continue
        end = ".weight" if isinstance(adapter, Lora) else ""
        found[f"{module}.lora_A{end}"] = place.theirs(own("a"), "a")
        found[f"{module}.lora_B{end}"] = place.theirs(own("b"), "b")
        if isinstance(adapter, AdaLora):
            found[f"{module}.lora_E"] = own("values").reshape(-1, 1)
        elif adapter.dora:
            size = place.norms(params[f"{place.path}/kernel"]) + own("magnitude")
            found[f"{module}.lora_magnitude_vector"] = place.theirs(size, "outputs")
    reached = {_target(places[module]) for module in modules}
    if lost := names - reached:
        raise UserError(
            f"{min(lost)} is tuned, and is no product of its own in Hugging Face's names: tune its "
            "parts (query, key, value), or merge the adapter."
        )
    every = list(places)
    fields: dict[str, Any] = {
        "peft_version": "0.21.2",
        "base_model_name_or_path": None,
        "task_type": "CAUSAL_LM" if causal else None,
        "inference_mode": True,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "target_modules": _ends_of(modules, every),
    }
    if isinstance(adapter, Ia3):
        fields |= {"peft_type": "IA3", "feedforward_modules": _ends_of(inputs, every)}
    else:
        fields |= {"lora_dropout": adapter.dropout, "bias": "none"}
    if isinstance(adapter, AdaLora):
        alpha = adapter.scale * (adapter.rank + 1e-5)
        fields |= {"peft_type": "ADALORA", "init_r": adapter.rank, "lora_alpha": alpha}
        fields |= {"target_r": adapter.rank, "total_step": 1}
    elif isinstance(adapter, Lora):
        fields |= {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha}
        fields |= {"use_rslora": adapter.scaling == "rslora", "use_dora": adapter.dora}
    to.mkdir(parents=True, exist_ok=True)
    write_file(to / TENSORS, [_out(name, x) for name, x in sorted(found.items())])
    (to / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    (to / ABOUT).write_text(json.dumps({"base": base}) + "\n", "utf-8")


def fingerprint(stored: Stored, lie: Mapping[str, str], paths: Sequence[str]) -> str:
    """A hash of the kernels at these paths, the same in float32 and bfloat16: some elements each.

    Args:
      lie: see `engine.stored.variables`.
      paths: of products.
    """
    whole = hashlib.sha256()
    for path in sorted(paths):
        array = stored.array(lie[f"params/{path}/kernel"])
        row = max(1, math.prod(array.shape[1:]))
        rows = np.linspace(0, array.shape[0] - 1, max(1, min(array.shape[0], SAMPLED // row)))
        for index in np.unique(rows.astype(int)):
            values = np.asarray(array[int(index)].read().result()).reshape(-1)
            step = max(1, values.size * len(rows) // SAMPLED)
            sample = values[::step].astype(ml_dtypes.bfloat16)
            whole.update(path.encode() + np.ascontiguousarray(sample).view(np.uint8).tobytes())
    return whole.hexdigest()


def _target(place: Place) -> str:
    """What an adapter calls the product."""
    return place.path if place.part is None else f"{place.path}/{place.part.name}"


def _side(adapter: Adapter, place: Place) -> str:
    """Whether an IA3's vector is over inputs or outputs."""
    assert isinstance(adapter, Ia3)
    site = replace(place.site, parts=() if place.part is None else (place.part,))
    return "inputs" if adapter.multiplies_inputs(site) else "outputs"


def _ends(module: str, names: Any) -> bool:
    """Whether peft takes these names for a module's."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _ends_of(modules: Sequence[str], every: Sequence[str]) -> list[str]:
    """The shortest ends of names that mean these modules and no others."""
    found: dict[str, None] = {}
    chosen = set(modules)
    for module in modules:
        words = module.split(".")
        for count in range(1, len(words) + 1):
            end = ".".join(words[-count:])
            if all(other in chosen for other in every if _ends(other, [end])):
                found[end] = None
                break
    return list(found)


def _out(name: str, x: np.ndarray) -> Out:
    def rows() -> Iterator[np.ndarray]:
        yield x

    return Out(name, x.shape, np.dtype(np.float32), rows)
