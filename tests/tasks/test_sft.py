"""Supervised fine-tuning on conversations: the loss of transformers, whatever cuts the batch."""

import json
import os

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from lmjax.data.conversations import Conversation
from lmjax.data.dialogue import Dialogue
from lmjax.data.dialogue_rows import chat_tokens
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.program import compile_program
from lmjax.models.gpt import gpt
from lmjax.models.llama import llama
from lmjax.ops.rope import RopeScaling
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM
from tests.convert import folders
from tests.tasks import sft_reference
from tests.tasks.sft_reference import CONFIG, CONVERSATIONS

LENGTH = 240


def reference():
    return json.loads(sft_reference.FILE.read_text())


def packed(conversations):
    """All of them in one row, apart: what `Dialogue` promises of a row."""
    names = ("tokens", "targets", "segments", "positions", "weights")
    columns = {name: [] for name in names}
    for number, one in enumerate(conversations, start=1):
        size = len(one["ids"]) - 1
        columns["tokens"] += one["ids"][:-1]
        columns["targets"] += one["ids"][1:]
        columns["weights"] += one["mask"][1:]
        columns["segments"] += [number] * size
        columns["positions"] += range(size)
    rows = {}
    for name, column in columns.items():
        dtype = np.float32 if name == "weights" else np.int32
        rows[name] = np.zeros((1, LENGTH), dtype)
        rows[name][0, : len(column)] = column
    return rows


def test_loss_is_that_of_transformers():
    """Of masked labels, though the conversations share a row."""
    scaling = CONFIG["rope_scaling"]
    model = llama(
        num_layers=1,
        dim=CONFIG["hidden_size"],
        num_heads=CONFIG["num_attention_heads"],
        num_kv_heads=CONFIG["num_key_value_heads"],
        hidden=CONFIG["intermediate_size"],
        vocab_size=CONFIG["vocab_size"],
        vocab_multiple=1,
        max_length=LENGTH,
        rope_theta=CONFIG["rope_theta"],
        rope_scaling=RopeScaling(
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_length=scaling["original_max_position_embeddings"],
        ),
    )
    params = unflatten_dict(folders.ours(CONFIG, folders.drawn(CONFIG)), sep="/")
    task = CausalLM(model=model)
    run = jax.jit(lambda batch: task.loss({"params": params}, batch, jax.random.key(0), train=True))
    wanted = [(one["loss"], sum(one["mask"][1:])) for one in reference()]
    total = sum(loss * count for loss, count in wanted)
    found = run(packed(reference())).loss
    assert float(found.weight) == sum(count for _, count in wanted)
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    alone = run(packed(reference()[1:2])).loss
    np.testing.assert_allclose(alone.value, wanted[1][0], rtol=1e-5)


def test_ids_and_mask_are_those_of_transformers(tmp_path):
    if not os.environ.get("CI"):
        pytest.importorskip("jinja2")
    folder = folders.write(tmp_path / "llama", CONFIG, {})
    tokenizer = Dialogue(
        path="made", vocabulary=Pretrained(path=str(folder)), template="plain"
    ).tokenizer
    for messages, wanted in zip(CONVERSATIONS, reference(), strict=True):
        found = chat_tokens(tokenizer, Conversation(messages=messages, tools=None, name="x"))
        last = max(i for i, said in enumerate(wanted["mask"]) if said) + 1
        assert found.ids.tolist() == wanted["ids"][:last]
        assert found.assistant.astype(int).tolist() == wanted["mask"][:last]


@pytest.mark.slow
def test_the_reference_is_what_transformers_computes():
    for name in ("torch", "transformers", "jinja2"):
        pytest.importorskip(name)
    for found, stored in zip(sft_reference.computed(), reference(), strict=True):
        assert (found["ids"], found["mask"]) == (stored["ids"], stored["mask"])
        np.testing.assert_allclose(found["loss"], stored["loss"], rtol=1e-6)


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch_though_masks_differ():
    """One division, by all of the assistant's tokens; some rows have one and some have many."""
    model = gpt(num_layers=1, dim=16, num_heads=2, vocab_size=30, max_length=12, vocab_multiple=2)
    random = np.random.default_rng(0)
    shape = (8, 12)
    batch = {name: random.integers(0, 30, shape).astype("i4") for name in ("tokens", "targets")}
    ends = random.integers(2, 10, (8, 1))
    batch["segments"] = 1 + (np.arange(12) >= ends).astype("i4")
    batch["positions"] = (np.arange(12) - (batch["segments"] - 1) * ends).astype("i4")
    share = np.linspace(0.02, 0.9, 8)[:, None]
    batch["weights"] = (random.random(shape) < share).astype("f4")
    batch["weights"][0] = 0
    sums = batch["weights"].sum(axis=1)
    assert len({*sums.tolist()}) > 4
    example = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batch.items()}
    found = []
    for microbatches in (1, 4):
        program = compile_program(
            CausalLM(model=model),
            optax.sgd(1.0),
            Layout(),
            example,
            batch_size=8,
            microbatches=microbatches,
            devices=jax.devices()[:1],
        )
        state, metrics = program.train_step(program.init(), program.put(batch))
        assert float(metrics["loss"].weight) == sums.sum()
        found.append((state.params, float(metrics["loss"].value)))
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), found[1][0], found[0][0]
    )
