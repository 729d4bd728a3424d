"""Against peft 0.21.2: folders both ways, outputs, losses, gradients, and 80 steps of AdaLoRA.

Two kinds and the run are stored (`peft_reference`); where peft is installed, all are made anew.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.adapt.adalora import AdaLora
from lmjax.adapt.adapted import adapted
from lmjax.adapt.allocation import adalora
from lmjax.config import build
from lmjax.convert.bert import BERT as BERT_FAMILY
from lmjax.convert.bert import arranged
from lmjax.convert.llama import LLAMA as LLAMA_FAMILY
from lmjax.convert.parts import blocks, shapes
from lmjax.convert.peft import PREFIX, read_adapter, write_adapter
from lmjax.convert.places import places_of
from lmjax.convert.settings import Settings
from lmjax.convert.shards import Out, read_file, write_file
from lmjax.errors import UserError
from lmjax.ops.losses import logits
from tests.adapt import peft_reference
from tests.adapt.peft_reference import BERT, LLAMA, PATH, RATE, SCHEDULE, STEPS, tokens


class Array:
    """A tensor in memory, as `parts.blocks` reads one."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def rows(self, start, stop):
        return self.x[start:stop]


def model_of(kind, weights):
    """(model, its parameters by path, its products) of a base's tensors."""
    if kind == "bert":
        family, settings = BERT_FAMILY, Settings("here", {"model_type": "bert", **BERT})
        weights = {k: x for k, x in weights.items() if not k.endswith("position_ids")}
        settings, _ = arranged(settings, {k: Array(x) for k, x in weights.items()})
    else:
        family, settings = LLAMA_FAMILY, Settings("here", {"model_type": "llama", **LLAMA})
    table = family.parts(settings)
    tensors = {k: Array(x) for k, x in weights.items()}
    params = {}
    for path, shape in shapes(table).items():
        params[path] = np.zeros(shape, np.float32)
        parts = [p for p in table if p.path == path]
        for start, block in blocks(shape, np.dtype(np.float32), parts, tensors):
            cut = tuple(slice(s, s + n) for s, n in zip(start, block.shape, strict=True))
            params[path][cut] = block
    model = build(family.recorded(settings, "float32"))
    if kind == "bert":
        model = model.clone(dropout=0.0)
    return model, params, places_of(model, table)


def folder_of(folder, found):
    """A case as the folder that it was saved as."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(str(found["config"]))
    tensors = {k.removeprefix("tensor/"): x for k, x in found.items() if k.startswith("tensor/")}
    outs = [Out(k, x.shape, x.dtype, lambda x=x: iter([x])) for k, x in tensors.items()]
    write_file(folder / "adapter_model.safetensors", outs)
    return folder


def case_of(name):
    if name in ("dora", "ia3"):
        with np.load(PATH) as held:
            found = {k.removeprefix(f"{name}/"): held[k] for k in held.files if k.startswith(name)}
            return found | {k: held[k] for k in held.files if k.startswith("base/")}
    pytest.importorskip("peft")
    return peft_reference.case(name)


def joined(kind, found, folder):
    """(adapted model, params, products) of a case."""
    weights = {k.removeprefix("base/"): x for k, x in found.items() if k.startswith("base/")}
    weights.pop("lm_head.weight", None)
    model, params, places = model_of(kind, weights)
    adapter, arrays = read_adapter(folder, places, lambda path: params[f"{path}/kernel"])
    return adapted(model=model, adapters=(adapter,)), params | arrays, places


def loss_of(model, kind, params):
    """(loss, output), as `peft_reference.case` has them."""
    ids = jnp.asarray(tokens(), jnp.int32)
    output = model.apply({"params": unflatten_dict(params, sep="/")}, ids)
    if kind == "bert":
        return jnp.mean(jnp.square(output.hidden_BTD)), output.hidden_BTD
    all_BTV = logits(output.hidden_BTD, output.unembedding)[..., :32]
    nll = optax.softmax_cross_entropy_with_integer_labels(all_BTV[:, :-1], ids[:, 1:])
    return jnp.mean(nll), all_BTV


@pytest.mark.filterwarnings("default")  # those of torch and transformers
@pytest.mark.parametrize(
    "kind",
    [
        "dora",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("ia3", "lora", "rslora", "adalora", "bert")
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_peft(kind, tmp_path):
    found = case_of(kind)
    model, params, places = joined(kind, found, folder_of(tmp_path / "in", found))
    own = {k: jnp.asarray(x) for k, x in params.items() if f"/{model.adapters[0].name}/" in k}
    rest = {k: jnp.asarray(x) for k, x in params.items() if k not in own}

    @jax.jit
    def run(own):
        return jax.value_and_grad(lambda p: loss_of(model, kind, rest | p), has_aux=True)(own)

    (loss, output), gradient = run(own)
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-5)
    np.testing.assert_allclose(output, found["output"], atol=1e-4)
    # A gradient is read as the adapter's own tensors are: both lie alike.
    given = {k: x for k, x in found.items() if k.startswith("gradient/")}
    as_tensors = {f"tensor/{PREFIX}{k.removeprefix('gradient/')}": x for k, x in given.items()} | {
        "config": found["config"]
    }
    _, wanted = read_adapter(
        folder_of(tmp_path / "gradient", as_tensors),
        places,
        lambda path: np.zeros_like(params[f"{path}/kernel"]),
    )
    assert wanted.keys() == gradient.keys()
    for path, x in wanted.items():
        np.testing.assert_allclose(gradient[path], x, atol=1e-5, rtol=1e-4, err_msg=path)
    # And back: the folder that we write holds the tensors that we read.
    write_adapter(tmp_path / "out", model, params, places, causal=kind != "bert")
    for name, tensor in read_file(tmp_path / "out" / "adapter_model.safetensors").items():
        x = tensor.rows(0, tensor.shape[0])
        assert x.shape == found[f"tensor/{name}"].shape
        np.testing.assert_allclose(x, found[f"tensor/{name}"], atol=1e-6)
    assert len(given) == len(read_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3", "adalora", "bert"])
def test_peft_loads_what_we_write(kind, tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    found = peft_reference.case(kind)
    model, params, places = joined(kind, found, folder_of(tmp_path / "in", found))
    rng = np.random.default_rng(1)
    name = f"/{model.adapters[0].name}/"
    for path in [path for path in params if name in path]:
        params[path] = params[path] + np.float32(0.1) * rng.normal(size=params[path].shape)
        params[path] = params[path].astype(np.float32)
    write_adapter(tmp_path / "out", model, params, places, causal=kind != "bert")
    theirs = peft.PeftModel.from_pretrained(peft_reference.base(kind), tmp_path / "out")
    output = theirs(input_ids=torch.as_tensor(tokens()))
    output = output.last_hidden_state if kind == "bert" else output.logits
    ours = jax.jit(lambda p: loss_of(model, kind, p))(params)[1]
    np.testing.assert_allclose(ours, output.detach().numpy(), atol=1e-4)


def run_of_adalora(found, kind="peft"):
    """(losses, ranks by step) of ours from the same start."""
    weights = {k.removeprefix("base/"): x for k, x in found.items() if k.startswith("base/")}
    weights.pop("lm_head.weight", None)
    base, rest, places = model_of("llama", weights)
    start = {k.removeprefix("start/"): x for k, x in found.items() if k.startswith("start/")}
    targets = tuple(
        dict.fromkeys(
            "/".join(filter(None, (p.path, p.part and p.part.name)))
            for module, p in places.items()
            if f"{module}.lora_E" in start
        )
    )
    adapter = AdaLora(targets=targets, rank=SCHEDULE["init_r"], alpha=SCHEDULE["lora_alpha"])
    model = adapted(model=base, adapters=(adapter,))
    own, order = {}, []
    for module, place in sorted(places.items()):
        if f"{module}.lora_E" not in start:
            continue
        piece = f"{place.part.name}_" if place.part else ""
        path = f"{place.path}/adalora/{piece}"
        order.append((f"{path}values", place.at))
        for theirs, ours in (("A", "a"), ("B", "b")):
            layer = place.ours(start[f"{module}.lora_{theirs}"], ours)
            own.setdefault(f"{path}{ours}", {})[place.at] = layer
        own.setdefault(f"{path}values", {})[place.at] = start[f"{module}.lora_E"].ravel()
    own = {k: jnp.stack([layers[i,] for i in range(len(layers))]) for k, layers in own.items()}
    rest = {k: jnp.asarray(x) for k, x in rest.items()}
    optimizer = adalora(
        optimizer=optax.sgd(RATE),
        steps=STEPS,
        target_rank=SCHEDULE["target_r"],
        warmup_steps=SCHEDULE["tinit"],
        final_steps=SCHEDULE["tfinal"],
        every=SCHEDULE["deltaT"],
        orthogonality=SCHEDULE["orth_reg_weight"],
        form=kind,
    )
    params = unflatten_dict(own, sep="/")

    def step(carry, _):
        params, state = carry
        flat = flatten_dict(params, sep="/")

        def loss(flat):
            return loss_of(model, "llama", rest | flat)[0]

        value, gradient = jax.value_and_grad(loss)(flat)
        updates, state = optimizer.update(unflatten_dict(gradient, sep="/"), state, params)
        params = optax.apply_updates(params, updates)
        flat = flatten_dict(params, sep="/")
        ranks = [jnp.sum(flat[path][at] != 0) for path, at in order]
        return (params, state), (value, jnp.stack(ranks), state.ranks)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=STEPS)[1])
    losses, ranks, total = run((params, optimizer.init(params)))
    np.testing.assert_array_equal(total, np.sum(ranks, axis=1))
    return np.asarray(losses), np.asarray(ranks)


def compare_runs(found):
    losses, ranks = run_of_adalora(found)
    np.testing.assert_array_equal(ranks, found["ranks"])
    np.testing.assert_allclose(losses, found["losses"], atol=1e-6, rtol=0)
    assert losses[-1] < losses[0] - 0.01
    assert ranks[-1].sum() == SCHEDULE["target_r"] * ranks.shape[1] < ranks[0].sum()
    assert len(np.unique(ranks[-1])) > 1  # it is not the same rank everywhere


@pytest.mark.slow
def test_eighty_steps_of_adalora_are_those_of_peft():
    with np.load(PATH) as held:
        found = {k.removeprefix("run/"): held[k] for k in held.files}
    compare_runs(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_eighty_steps_of_adalora_made_anew():
    pytest.importorskip("peft")
    weights = {f"base/{k}": x.numpy() for k, x in peft_reference.base("x").state_dict().items()}
    compare_runs(weights | peft_reference.adalora_run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"peft_type": "LOHA"}}, "LORA, ADALORA and IA3 can be imported"),
        ({"config": {"bias": "all"}}, "bias is 'all'"),
        ({"rename": ("q_proj", "qq_proj")}, "adapts 'model.layers.0.self_attn.qq_proj', and the"),
        ({"rename": ("lora_A", "lora_C")}, "lacks base_model.model.model.layers.0"),
        ({"cut": "layers.1.self_attn.q_proj"}, "adapts some layers and not others"),
        ({"widen": "layers.0.self_attn.q_proj.lora_A"}, "it is an adapter of another base"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change, message, tmp_path):
    found = case_of("dora")
    if "config" in change:
        found["config"] = json.dumps(json.loads(str(found["config"])) | change["config"])
    old, new = change.get("rename", ("", ""))
    changed = {}
    for key, x in found.items():
        if key.startswith("tensor/"):
            if change.get("cut", "never") in key:
                continue
            if change.get("widen", "never") in key:
                x = np.concatenate([x, x], axis=1)
            key = key.replace(old, new) if old else key
        changed[key] = x
    with pytest.raises(UserError, match=message):
        joined("dora", changed, folder_of(tmp_path / "in", changed))
