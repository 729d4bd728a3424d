"""Adapters through workdirs: imported, trained on, exported, merged, and refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from lmjax.adapt.adapted import Adapted, adapted
from lmjax.adapt.lora import Lora
from lmjax.config import build
from lmjax.convert.adapters import export_adapter, import_adapter, merge
from lmjax.convert.exports import described, export_folder
from lmjax.convert.imports import import_folder
from lmjax.convert.peft import fingerprint, write_adapter
from lmjax.convert.places import EXAMPLE, places_of
from lmjax.convert.settings import Settings
from lmjax.convert.shards import read_file
from lmjax.engine.state import paths_of
from lmjax.engine.stored import find, variables
from lmjax.errors import UserError
from lmjax.generate.language_model import load
from lmjax.models.saved import recorded_model
from lmjax.sharding import unbox
from tests.convert import folders

TUNED = ("q_proj", "o_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workdir of a small Llama at random weights."""
    folder = tmp_path_factory.mktemp("base")
    source = folders.write(folder / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
    import_folder(source, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A folder of an adapter for it at random numbers, as training would leave it."""
    stored = find(base)[-1]
    lie = variables(stored.manifest()["arrays"])
    model = build(recorded_model(base))
    tuned = adapted(model=model, adapters=(Lora(targets=TUNED, rank=2, alpha=4.0),))
    shapes = jax.eval_shape(lambda: unbox(tuned.init(jax.random.key(0), EXAMPLE))["params"])
    rng = np.random.default_rng(0)
    params = {
        path: (0.3 * rng.normal(size=x.shape)).astype(np.float32)
        for path, x in paths_of(shapes).items()
    }
    family, fields = described(model)
    places = places_of(model, family.parts(Settings("the model", fields)))
    to = tmp_path_factory.mktemp("adapter")
    paths = list(tuned.sites(EXAMPLE)["lora"])
    kernels = fingerprint(stored, lie, paths)
    write_adapter(to, tuned, params, places, causal=True, base=kernels)
    return to


def arrays_of(workdir):
    stored = find(workdir)[-1]
    lie = variables(stored.manifest()["arrays"])
    return {k: np.asarray(stored.array(path).read().result()) for k, path in lie.items()}


def test_a_folder_goes_in_and_out_again_and_merges(base, adapter, tmp_path):
    import_adapter(adapter, base, tmp_path / "run")
    model = build(recorded_model(tmp_path / "run"))
    assert isinstance(model, Adapted)
    export_adapter(tmp_path / "run", tmp_path / "out")
    one, two = (read_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out"))
    assert one.keys() == two.keys() and len(one) == 2 * 3 * 3  # matrices, products, layers
    for name, x in one.items():
        rows = x.shape[0]
        np.testing.assert_array_equal(x.rows(0, rows), two[name].rows(0, rows))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (2, 4.0)
    assert sorted(fields["target_modules"]) == sorted(TUNED)
    merge(tmp_path / "run", tmp_path / "merged")
    merged, old = arrays_of(tmp_path / "merged"), arrays_of(base)
    assert merged.keys() == old.keys()
    changed = {k for k in old if not np.array_equal(merged[k], old[k])}
    assert {k.split("/")[-2] for k in changed} == {"qkv", "out", "down"}
    a = one["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].rows(0, 2)
    b = one["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    delta = 2.0 * b.rows(0, b.shape[0]) @ a
    path = "params/blocks/block/mlp/down/kernel"
    np.testing.assert_allclose(merged[path][1] - old[path][1], delta.T, atol=1e-6)


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(base, adapter, tmp_path):
    other = tmp_path / "other"
    weights = folders.drawn(folders.LLAMA)
    weights = {k: x * np.asarray(1.5, x.dtype) for k, x in weights.items()}
    import_folder(folders.write(tmp_path / "in", folders.LLAMA, weights), other)
    with pytest.raises(UserError, match="adapter of another base: the kernels that it tunes have"):
        import_adapter(adapter, other, tmp_path / "run")
    with pytest.raises(UserError, match="has no adapters"):
        export_adapter(base, tmp_path / "out")
    with pytest.raises(UserError, match="has no adapters"):
        merge(base, tmp_path / "out")
    with pytest.raises(UserError, match="holds a run already"):
        import_adapter(adapter, base, other)
    shutil.copytree(adapter, tmp_path / "copy")
    (tmp_path / "copy" / "lmjax.json").unlink()  # as peft writes one
    import_adapter(tmp_path / "copy", base, tmp_path / "tuned")
    with pytest.raises(UserError, match="merge them first"):
        export_folder(tmp_path / "tuned", tmp_path / "out")
    with pytest.raises(UserError, match="has adapters already"):
        import_adapter(adapter, tmp_path / "tuned", tmp_path / "run")
    with pytest.raises(UserError, match="holds an adapter already"):
        export_adapter(tmp_path / "tuned", adapter)


@pytest.mark.slow
def test_text_is_the_same_with_the_adapter_and_merged(base, adapter, tmp_path):
    import_adapter(adapter, base, tmp_path / "run")
    merge(tmp_path / "run", tmp_path / "merged")
    texts = []
    for workdir in (tmp_path / "run", tmp_path / "merged", base):
        texts.append(load(workdir).generate("the ", max_tokens=12, temperature=0.0))
    assert texts[0] == texts[1] != texts[2]
