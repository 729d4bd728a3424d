"""lm-evaluation-harness on a model of lmjax: its model class, and its tasks run with it.

It is imported only where a task of the harness is asked for; it needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import LM

from lmjax.data.tokenizer import TextTokenizer
from lmjax.errors import UserError
from lmjax.evaluate.answer import Answering, Progress
from lmjax.generate.language_model import LanguageModel

NEAR = 5  # names of tasks that an error suggests


class HarnessLM(LM):  # type: ignore[misc, unused-ignore]  # lm_eval may be absent, LM then Any
    """A model of lmjax as lm-evaluation-harness (0.4.13) calls one; see `Answering`."""

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int = 8,
        length: int = 0,
        seed: int = 0,
        devices: Sequence[jax.Device] | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._answering = Answering(
            lm,
            batch_size=batch_size,
            length=length,
            seed=seed,
            devices=devices,
            progress=progress,
        )

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See `Answering.loglikelihood`."""
        return self._noted(
            "loglikelihood", requests, self._answering.loglikelihood(_args(requests))
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See `Answering.loglikelihood_rolling`."""
        found = self._answering.loglikelihood_rolling([text for (text,) in _args(requests)])
        return self._noted("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See `Answering.generate_until`."""
        found = self._answering.generate_until(_args(requests))
        return self._noted("generate_until", requests, found)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model was trained to read it; see `data.chat`."""
        return (
            _chat(self._tokenizer)
            .render(
                chat_history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            .text
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's own text, for the harness's records."""
        if not chat_template:
            return None
        templates = dict(_chat(self._tokenizer).templates)
        name = chat_template if isinstance(chat_template, str) else "default"
        return templates.get(name, "")

    @property
    def max_length(self) -> int:
        """The longest context; some tasks make their questions by it."""
        return self._answering.max_length

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._tokenizer.hash

    @property
    def _tokenizer(self) -> TextTokenizer:
        return self._answering.lm.tokenizer

    def _noted(self, kind: str, requests: list[Any], found: list[Any]) -> list[Any]:
        """The results, which the harness may keep."""
        for args, result in zip(_args(requests), found, strict=True):
            self.cache_hook.add_partial(kind, args, result)
        return found


def evaluate_tasks(
    model: HarnessLM,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs tasks of the harness; returns what it reports, in JSON's types.

    Args:
      model: what is evaluated.
      tasks: see `load_tasks`.
      num_fewshot: examples before each question; None for what the task says.
      limit: questions of each task, or below 1 the share of them; None for all.
      apply_chat_template: puts prompts as a user's message.
      log_samples: also returns each question with the model's answers, as `samples`.
      seed: of the examples that are drawn.

    Raises UserError for what the model cannot answer, and for a chat template that it lacks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if apply_chat_template:
        _chat(model._tokenizer)
    found: Any = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),  # by default it lists all tasks again
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        log_samples=log_samples,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    names = ["results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs"]
    names += ["samples"] if log_samples else []
    kept = {name: found[name] for name in names if name in found}
    plain: dict[str, Any] = json.loads(
        json.dumps(kept, default=str),
        parse_constant=lambda _: None,  # NaN, as of the error of a single question
    )
    return plain


def load_tasks(tasks: Sequence[str], task_path: str | Path | None = None) -> list[Any]:
    """The harness's tasks and groups, with their data.

    Args:
      tasks: names of tasks, groups and tags, or .yaml files.
      task_path: a folder of further task files. They can run Python: take only what you trust.

    Raises:
      UserError: where there is no such task, or it cannot be loaded: offline, unless the variable
        HF_HUB_OFFLINE is set to 0, only local data can.
    """
    from lm_eval.tasks import TaskManager

    if task_path is not None and not Path(task_path).is_dir():
        raise UserError(f"--task_path: {task_path} is no folder. Name one that holds task files.")
    own = [str(task_path)] if task_path is not None else None

    def unknown(manager: Any) -> list[str]:
        return [t for t in tasks if t not in manager.all_tasks and not _is_file(t)]

    # The harness's own tasks take ten seconds to list.
    manager = TaskManager(include_path=own, include_defaults=False)
    if unknown(manager):
        manager = TaskManager(include_path=own)
    if wrong := unknown(manager):
        raise UserError(f"there is no task {wrong[0]!r}.{_near(wrong[0], manager.all_tasks)}")
    built: list[Any] = []
    for name in tasks:
        try:
            made = manager.load([name])
        except Exception as error:  # of many libraries: what they say is all there is
            raise UserError(f"the task {name} cannot be loaded: {_why(error)}") from error
        groups = made.get("groups") or {}
        inner = {child for names in made.get("group_map", {}).values() for child in names}
        outer = [group for title, group in groups.items() if title not in inner]
        built += outer or list(made["tasks"].values())
    if not built:
        raise UserError(f"{', '.join(tasks)} holds no task: name tasks or .yaml files.")
    return built


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _near(name: str, known: Sequence[str]) -> str:
    import difflib

    if name.endswith((".yaml", ".yml")):
        return " There is no such file."
    close = difflib.get_close_matches(name, known, n=NEAR)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return f"{hint} Give a task of lm-evaluation-harness, a .yaml file, or --task_path=DIR."


def _why(error: Exception) -> str:
    text = " ".join((str(error) or type(error).__name__).split())[:400]
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    network = any(word in f"{type(error).__name__} {text}" for word in ("ffline", "Hub", "each"))
    if not (offline and network):
        return text
    return (
        f"{text.rstrip('.')}. Its data is not on this machine, and lmjax does not fetch any: set "
        "HF_HUB_OFFLINE=0 to let the harness download it, or give a task file whose dataset_path "
        "is 'json' and whose data_files are local."
    )


def _args(requests: Sequence[Any]) -> list[Any]:
    return [request.args for request in requests]


def _chat(tokenizer: TextTokenizer) -> Any:
    """The tokenizer's chat template; raises UserError where it has none."""
    if not hasattr(tokenizer, "chat"):
        raise UserError("the model's tokenizer has no chat template: evaluate without one.")
    return tokenizer.chat
