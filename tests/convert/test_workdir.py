"""What an imported workdir is good for: text, and the start of another run."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.convert.exports import export_folder
from lmjax.convert.imports import import_folder
from lmjax.convert.vocabulary import within
from lmjax.convert.weights import LOADERS, open_folder, place
from lmjax.data.pretrained import read_tokenizer
from lmjax.engine import warm_start
from lmjax.engine.checkpoint import Checkpoints
from lmjax.engine.run import Run, draft_run
from lmjax.engine.state import merge, paths_of
from lmjax.errors import UserError
from lmjax.generate.language_model import load
from lmjax.models.llama import llama
from lmjax.ops.losses import logits
from lmjax.ops.rope import RopeScaling
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import constant
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM
from tests.convert import folders
from tests.convert.folders import LLAMA

MODEL = {
    "num_layers": 3,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden": 48,
    "vocab_size": folders.VOCAB,
    "max_length": 64,
    "rope_theta": 500.0,
    "rope_scaling": RopeScaling(factor=8.0, original_length=16),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "in"
    return folders.write(folder, LLAMA, folders.drawn(LLAMA), num_shards=2)


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir") / "run"
    import_folder(source, workdir)
    return workdir


@pytest.mark.slow
def test_logits_are_those_of_transformers(tmp_path):
    """Those stored with the weights that transformers' GPT-2 had when it made them."""
    stored = np.load(Path(__file__).parents[1] / "models" / "gpt2_reference.npz")
    weights = {k.removeprefix("weight:"): stored[k] for k in stored if k.startswith("weight:")}
    config = {**folders.GPT2, "vocab_size": 61}
    source = folders.write(tmp_path / "in", config, weights)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:60])
    tokenizer["added_tokens"][0]["id"] = 60
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    import_folder(source, tmp_path / "run")
    lm = load(tmp_path / "run")
    output = jax.jit(lm.model.apply)(lm.variables, stored["tokens"])
    found = logits(output.hidden_BTD, output.unembedding)
    np.testing.assert_allclose(found, stored["logits"], rtol=1e-4, atol=1e-4)
    assert lm.step == 0 and lm.tokenizer.end_id == 60
    assert lm.tokenizer.decode(lm.tokenizer.encode("HI")) == "HI"


def run_of(init_from, layout, **model):
    made = llama(**{**MODEL, **model})
    return Run(
        task=CausalLM(model=made),
        optimizer=adamw(learning_rate=constant(peak=1e-3)),
        data=Words(),
        steps=2,
        batch_size=8,
        layout=layout,
        init_from=init_from,
    )


def ids(text):
    """Of the tokenizer that folders.write writes."""
    known = folders.byte_vocabulary()
    return [known[c] for c in text.replace(" ", "Ġ")]


class Words:
    """No text: what a run asks of its data before the first step."""

    example = {  # noqa: RUF012, nothing changes it
        "tokens": jax.ShapeDtypeStruct((16,), np.int32),
        "targets": jax.ShapeDtypeStruct((16,), np.int32),
        "weights": jax.ShapeDtypeStruct((16,), np.float32),
    }
    vocab_size = folders.VOCAB
    fitted = {"tokenizer": ""}  # noqa: RUF012, nothing changes it


@pytest.fixture(scope="module")
def padded():
    """A run whose tables are padded, and its program on eight devices."""
    run = run_of(None, Layout(data=2, fsdp=2, tensor=2), vocab_multiple=8)
    return run, draft_run(run, devices=jax.devices()[:8])


def test_init_from_a_folder_of_hugging_face(source, padded, caplog):
    """Straight to eight devices, the tables padded as this run's model has them."""
    with caplog.at_level(logging.INFO, logger="lmjax"):
        state = warm_start.start(f"hf:{source}", *padded, LOADERS)
    found = paths_of(merge(state.params, state.frozen))
    wanted = folders.ours(LLAMA, folders.drawn(LLAMA))
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        assert len(array.sharding.device_set) == 8
        expected = wanted[path]
        if path.endswith("table"):
            assert len(array) == 264 and not np.asarray(array[261:]).any()
            array = array[:261]
        np.testing.assert_array_equal(array, expected, err_msg=path)
    assert "10 parameters are loaded" in caplog.text
    assert "its tokenizer is another" in caplog.text


def test_rows_that_a_table_of_the_vocabulary_lacks_are_initialised():
    """Of its own alone: more positions would be another model, and fewer rows lose some."""
    shapes = {"embed/table": (4, 2), "positions/table": (4, 2)}
    wanted = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}

    def saved(rows, positions):
        sizes = {"embed/table": [rows, 2], "positions/table": [positions, 2]}
        return {"arrays": {f"params/{path}": {"shape": shape} for path, shape in sizes.items()}}

    warm = warm_start.WarmStart(path="x")
    assert warm_start.plan(warm, wanted, saved(3, 4)).reshaped == {"embed/table": ((3, 2), (4, 2))}
    for sizes, wrong in (((5, 4), "embed/table"), ((4, 3), "positions/table")):
        with pytest.raises(
            UserError, match=rf"{wrong} is \[4, 2\].* vocab_size and vocab_multiple"
        ):
            warm_start.plan(warm, wanted, saved(*sizes))

    class Task:
        def init(self, rng, batch):
            return {"params": {"embed": {"table": jax.numpy.full((4, 2), 7.0)}}}

    loaded = warm_start._Loaded(Task(), {"embed/table": jax.numpy.zeros((3, 2))})
    made = loaded.init(None, None)["params"]["embed"]["table"]
    np.testing.assert_array_equal(made, [[0, 0]] * 3 + [[7, 7]])


@pytest.mark.slow
def test_init_from_an_imported_workdir(workdir, padded):
    """Its tables have no padding, and this run's have."""
    state = warm_start.start(str(workdir), *padded)
    wanted = folders.ours(LLAMA, folders.drawn(LLAMA))
    for path, array in paths_of(merge(state.params, state.frozen)).items():
        if path.endswith("table"):
            assert len(array) == 264 and np.asarray(array[261:]).std() > 0.01  # as initialised
            array = array[:261]
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)


@pytest.mark.parametrize("path", ["hf:{}", pytest.param("{}", marks=pytest.mark.slow)])
def test_init_from_another_model_is_refused(source, workdir, devices, path):
    where = source if path.startswith("hf:") else workdir
    run = run_of(path.format(where), Layout(fsdp=8), hidden=64)
    with pytest.raises(
        UserError, match=r"has other sizes: blocks/block/mlp/down/kernel is \[3, 64"
    ):
        warm_start.start(run.init_from, run, draft_run(run, devices=devices), LOADERS)


def test_each_block_goes_to_its_devices(source, devices):
    """Every way to split an array, as one device has it."""
    weights = open_folder(source)
    path = "blocks/block/attention/qkv/kernel"  # [3, 32, 2, 4, 8]
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape(4, 2), ("a", "b"))
    wanted = folders.ours(LLAMA, folders.drawn(LLAMA))[path]
    for spec in ((), (None, "a", "b"), (None, None, "b", "a"), (None, ("a", "b")), ("c",)):
        if "c" in spec:
            mesh, spec = jax.sharding.Mesh(np.asarray(devices[:3]), ("c",)), ("c",)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        like = jax.ShapeDtypeStruct(wanted.shape, np.float32, sharding=sharding)
        made = place(weights, path, like)
        assert made.sharding == sharding
        np.testing.assert_array_equal(made, wanted)


def test_a_trained_run_is_exported_with_its_averages(tmp_path, workdir, source):
    """A checkpoint as a run leaves it, its tables padded: of the parameters their averages."""
    wanted = {k: 2 * v for k, v in folders.ours(LLAMA, folders.drawn(LLAMA)).items()}
    tree = {}
    for path, array in wanted.items():
        if path.endswith("table"):
            array = np.pad(array, ((0, 3), (0, 0)), constant_values=np.nan)
        node = tree
        for name in path.split("/")[:-1]:
            node = node.setdefault(name, {})
        node[path.split("/")[-1]] = jax.numpy.asarray(array)
    halved = jax.tree.map(lambda x: x / 2, tree)
    state = {"params": halved, "opt_state": {"averaged_params": tree}}
    config = json.loads((workdir / "config.json").read_text())
    config["task"]["model"]["vocab_multiple"] = 8
    tokenizer = (workdir / "tokenizer.json").read_text()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(7, state, {"config": config, "tokenizer": tokenizer})
    checkpoints.close()
    export_folder(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    weights = open_folder(tmp_path / "out")
    assert {weights.dtype(path).name for path in weights.arrays} == {"bfloat16"}
    for path, array in wanted.items():
        for start, block in weights.blocks(path):
            cut = tuple(slice(s, s + n) for s, n in zip(start, block.shape, strict=True))
            np.testing.assert_array_equal(block, array[cut].astype(folders.BF16))
    import_folder(tmp_path / "out", tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.to_json() == load(workdir).tokenizer.to_json()


def test_where_something_lies_already(workdir, source, tmp_path):
    with pytest.raises(UserError, match="holds a run already"):
        import_folder(source, workdir)
    with pytest.raises(UserError, match="holds a model already"):
        export_folder(workdir, source)


def test_a_folder_without_its_tokenizer(tmp_path, source):
    folder = folders.write(tmp_path / "in", LLAMA, folders.drawn(LLAMA))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer at"):
        import_folder(folder, tmp_path / "run")
    import_folder(folder, tmp_path / "run", tokenizer=source)
    export_folder(tmp_path / "run", tmp_path / "out")
    for where in (source, tmp_path / "run", tmp_path / "out"):
        assert read_tokenizer(str(where)).encode("To be").tolist() == ids("To be")


def test_tokens_that_the_model_has_no_rows_for(tmp_path, caplog):
    """Added ones are left out (Gemma 3's <image_soft_token>); a larger vocabulary is refused."""
    folder = folders.write(tmp_path / "in", LLAMA, folders.drawn(LLAMA))
    tree = json.loads((folder / "tokenizer.json").read_text())
    added = [{**tree["added_tokens"][0], "id": i, "content": f"<{i}>"} for i in range(257, 263)]
    tree["added_tokens"] += added
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    made = within(read_tokenizer(str(folder)), folders.VOCAB)
    assert "['<261>', '<262>']" in caplog.text
    assert made.vocab_size == folders.VOCAB
    assert made.encode_prompt("<260>").tolist() == [260]
    assert made.encode_prompt("<261>").tolist() == ids("<261>")
    with pytest.raises(UserError, match=r"has 263 ids, and the model only 250: .* --tokenizer"):
        within(read_tokenizer(str(folder)), 250)
