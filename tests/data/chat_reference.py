"""Makes chat_reference.json: what `transformers` renders, and which tokens the assistant says.

Usage: python -m tests.data.chat_reference, in an environment with `transformers` and jinja2.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import transformers

from tests.data.chat_cases import CASES, SPECIAL, TEMPLATES

FILE = Path(__file__).with_suffix(".json")


def byte_level() -> str:
    """A tokenizer.json of bytes and a few special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([*SPECIAL.values(), "<|im_start|>", "<|im_end|>"])
    return str(made.to_str())


def main() -> None:
    """Writes the file; null stands for what is refused."""
    text = byte_level()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(text), **SPECIAL
    )
    cases: dict[str, list[object]] = {}
    for name, template in TEMPLATES.items():
        cases[name] = []
        for messages, options in CASES:
            given = {k: v for k, v in options.items() if k != "variables"}
            given |= options.get("variables", {}) | {"chat_template": template}
            try:
                rendered = made.apply_chat_template(messages, tokenize=False, **given)
                ids = made.apply_chat_template(
                    messages,
                    return_dict=True,
                    return_assistant_tokens_mask="continue_final_message" not in options,
                    **given,
                )
            except Exception as error:
                print(name, options, type(error).__name__, str(error)[:70])
                cases[name].append(None)
                continue
            said = ids.get("assistant_masks")
            cases[name].append({"text": rendered, "ids": ids["input_ids"], "assistant": said})
    FILE.write_text(json.dumps({"tokenizer": text, "cases": cases}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
