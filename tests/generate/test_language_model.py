"""A trained run, loaded: from its folder alone, and what is said where that cannot be."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lmjax
from lmjax.config import build, call, to_dict
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import CharacterTokenizer
from lmjax.engine.loop import train
from lmjax.engine.state import paths_of
from lmjax.engine.streamed import write_checkpoint
from lmjax.errors import UserError
from lmjax.models.gpt import gpt
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as the engine leaves it, at steps 1 and 2; nothing is compiled for it."""
    folder = tmp_path_factory.mktemp("run")
    characters = "".join(sorted(set("To be, or not to be:\nthat is the question. ")))
    sizes = {"num_layers": 1, "dim": 32, "num_heads": 4, "max_length": 64}
    recorded = call(gpt, vocab_size=len(characters) + 1, **sizes)
    config = {"task": to_dict(call(CausalLM, model=recorded))}
    (folder / "config.json").write_text(json.dumps(config))
    model, random = build(recorded), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    arrays = {
        path: (0.3 * random.normal(size=x.shape)).astype(np.float32)
        for path, x in paths_of(unbox(shapes)).items()
    }
    arrays["params/embed/table"][-1] = 0.0  # the end, which is to come late
    arrays["params/norm/scale"] += 3.0
    about = {
        "config": config,
        "tokenizer": CharacterTokenizer(characters).to_json(),
        "fingerprint": "",
        "data": {"next_batch": 0, "left_out": []},
    }
    for step in (1, 2):
        write_checkpoint(
            folder / "checkpoints",
            step,
            {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()},
            lambda path: iter([((0,) * arrays[path].ndim, arrays[path])]),
            about,
        )
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of the character config on a text that is gone afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("To be, or not to be:\nthat is the question. " * 200)
    config = lmjax.load_config(
        f"{ROOT}/configs/char.py:smoke",
        {
            "steps": 2,
            "data.path": str(text),
            "save_every": 1,
            "optimizer.learning_rate.warmup_steps": 0,
        },
    )
    lmjax.train(config, str(folder / "run"), quiet=True, devices=jax.devices()[:1])
    text.unlink()
    return folder / "run"


@pytest.fixture(scope="module")
def lm(workdir):
    return lmjax.load(workdir)


@pytest.mark.slow
def test_a_trained_run_loads_without_its_corpus(trained):
    lm = lmjax.load(trained)
    assert lm.step == 2 and lmjax.load(trained, step=1).step == 1
    assert len(lm.generate("To be", max_tokens=30, seed=5)) <= 30


def test_a_run_loads_and_speaks(workdir, lm):
    assert lm.step == 2
    text = lm.generate("To be", max_tokens=30, seed=5)
    assert len(text) > 5 and text == lm.generate("To be", max_tokens=30, seed=5)
    assert text == "".join(lm.stream("To be", max_tokens=30, seed=5))
    assert lmjax.load(workdir, step=1).step == 1
    with pytest.raises(UserError, match="'Z'"):
        lm.generate("Z")


def test_greedy_text_follows_the_logits(lm):
    prompt = "that is"
    token = int(np.argmax(lm.logits(prompt)[-1]))
    assert lm.generate(prompt, max_tokens=1, temperature=0.0) == lm.tokenizer.decode([token])


def test_prompts_together_give_what_each_gives_alone(lm):
    prompts, seeds = ["To be", "that is the question", "n"], [3, 4, 3]
    how = {"max_tokens": 25, "temperature": 1.0, "top_k": 0, "top_p": 0.95}
    alone = [lm.generate(p, seed=s, **how) for p, s in zip(prompts, seeds, strict=True)]
    assert lm.generate_batch(prompts, seed=seeds, **how) == alone
    stop = [alone[0][-15:-13], alone[1][-8:-6]]
    cut = [text[: min(text.find(one) % 99 for one in stop)] for text in alone]
    assert all(len(cut[i]) < len(alone[i]) for i in (0, 1)) and all(stop)
    assert lm.generate_batch(prompts, seed=seeds, stop=stop, **how) == cut
    assert "".join(lm.stream(prompts[0], seed=3, stop=stop, **how)) == cut[0]
    with pytest.raises(UserError, match="2 seeds for 3 prompts"):
        lm.generate_batch(prompts, seed=[1, 2])


def test_search_finds_texts_with_their_scores(lm):
    found = lm.search("To be", num_beams=3, max_tokens=6)
    assert len(found) == 3 and sorted(found, key=lambda one: -one[1]) == found
    text, score = found[0]
    rows = jax.nn.log_softmax(lm.logits("To be" + text))
    ids = lm.tokenizer.encode("To be" + text)
    total = sum(float(rows[i - 1, ids[i]]) for i in range(5, len(ids)))
    assert len(text) == 6 and score == pytest.approx(total / 6, abs=1e-4)
    stopped = lm.search("To be", num_beams=3, max_tokens=6, stop=[text[2]])
    assert all(text[2] not in one for one, _ in stopped)


def test_a_text_ends_at_any_of_the_published_ends(workdir, lm, tmp_path):
    """As several ids in generation_config.json, which goes before config.json."""
    how = {"max_tokens": 20, "temperature": 0.0}
    text = lm.generate("To be", **how)
    ends = lm.tokenizer.encode(text[5] + text[9]).tolist()
    run = shutil.copytree(workdir, tmp_path / "run")
    (run / "huggingface").mkdir()
    (run / "huggingface" / "config.json").write_text(json.dumps({"eos_token_id": ends[1]}))
    one = lmjax.load(run)
    assert one.end_ids == {lm.tokenizer.end_id, ends[1]}
    (run / "huggingface" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    several = lmjax.load(run)
    assert several.end_ids == {lm.tokenizer.end_id, *ends}
    several = dataclasses.replace(several, decoding=lm.decoding)  # compiled already
    cut = min(text.index(one) for one in (text[5], text[9]))
    assert several.generate("To be", **how) == text[:cut]
    (run / "huggingface" / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config.json cannot be read"):
        lmjax.load(run)


def test_a_conversation_is_read_by_its_template(lm):
    """And a text with what the tokenizer puts before it."""
    if not os.environ.get("CI"):
        pytest.importorskip("jinja2")
    talker = dataclasses.replace(lm, tokenizer=chat_tokenizer())
    ids = talker.encode([{"role": "user", "content": "hi"}])
    control = talker.tokenizer.special_id
    assert ids.tolist() == [control("bos_token"), *b"hi", control("eos_token")]
    assert talker.encode("hi").tolist() == [control("bos_token"), *b"hi"]
    with pytest.raises(UserError, match="bytes or characters, has no chat template"):
        lm.generate([{"role": "user", "content": "hi"}])


def chat_tokenizer():
    """Bytes as ids, <s> before every text, and </s> before an answer."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], byte_fallback=True))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return SubwordTokenizer(
        tokenizer_json=made.to_str(),
        vocab_size=258,
        end_id=257,
        special_tokens=(("bos_token", "<s>"), ("eos_token", "</s>")),
        chat_templates=(
            (
                "default",
                "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            ),
        ),
    )


@pytest.mark.slow
def test_the_command_continues_prompts(workdir, lm):
    """One prompt, several, and beams; what it prints is what the notebook gets."""

    def run(*flags):
        command = [sys.executable, "-m", "lmjax.generate", f"--workdir={workdir}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    how = {"max_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.3}
    flags = ["--max_tokens=12", "--temperature=0", "--repetition_penalty=1.3"]
    first, second = lm.generate("To be", **how), lm.generate("that", **how)
    assert run("--prompt=To be", *flags) == (0, f"To be{first}\n", "")
    code, printed, _ = run("--prompt=To be", "--prompt=that", *flags)
    assert (code, printed) == (0, f"To be{first}\n\nthat{second}\n")
    (text, score), *_ = lm.search("To be", num_beams=2, max_tokens=5)
    code, printed, _ = run("--prompt=To be", "--num_beams=2", "--max_tokens=5")
    assert code == 0 and printed.startswith(f"To be{text}\n") and f"{score:.3f}" in printed
    code, _, error = run("--prompt=To be", "--top_p=0")
    assert code == 2 and "top_p is 0.0: must be above 0" in error
    code, _, error = run("--prompt=To be", "--num_beams=2", "--top_p=0.5")
    assert code == 2 and "--num_beams" in error and "--top_p" in error
    code, _, error = run("--prompt=To be", "--chat")
    assert code == 2 and "has no chat template" in error
    code, _, error = run("--prompt=To be", "--system=Be brief.")
    assert code == 2 and "give --chat too" in error


@pytest.mark.parametrize("step", [None, 2])
def test_a_damaged_checkpoint_is_named_and_left(workdir, tmp_path, step):
    run = shutil.copytree(workdir, tmp_path / "run")
    for path in (run / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"step 2 .*cannot be read.*Other steps: 1"):
        lmjax.load(run, step=step)
    assert lmjax.load(run, step=1).step == 1


def test_what_is_no_run_is_refused(workdir, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        lmjax.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 1, 2"):
        lmjax.load(workdir, step=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json cannot be read .*: it is damaged"),
        ("[" * 100_000, "cannot be read .*recursion"),
        ("[]", "has no task.model"),
        ('{"task": {"model": 5}}', "has no task.model"),
        ('{"task": {"model": {"_call": "lmjax.models.gpt:gtp"}}}', "is damaged: config: cannot"),
        ('{"task": {"model": {"_call": "json:loads", "s": "5"}}}', "is damaged: it gives 5"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        lmjax.load(tmp_path)


def test_the_launcher_and_the_notebook_are_one(workdir):
    """`lmjax.train` stays the function after the launcher's parts have been imported."""
    import lmjax.engine.loop

    assert callable(lmjax.train) and lmjax.engine.loop.train is train
