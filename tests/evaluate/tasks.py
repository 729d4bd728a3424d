"""Three tasks of lm-evaluation-harness, one for each kind of request, over `facts.jsonl`.

The facts were written for this: 60 sentences, each with its right end and three wrong ones.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from lmjax.data.source import Document

FACTS = Path(__file__).with_name("facts.jsonl")

SHARED = """
dataset_path: json
test_split: test
fewshot_split: test
dataset_kwargs:
  data_files:
    test: {path}
metadata: {{version: 1}}
"""
CHOICE = """
task: facts
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
task: facts_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
SAID = """
task: facts_said
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [".", ",", "\\n"], do_sample: false, max_gen_toks: 8}
filter_list:
  - name: stripped
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
"""


def facts() -> list[dict]:
    return [json.loads(line) for line in FACTS.read_text().splitlines()]


def texts() -> list[str]:
    """Documents of unequal lengths, made of the facts."""
    sentences = [f"{fact['question']} {fact['choices'][fact['answer']]}." for fact in facts()]
    cuts = [0, 1, 4, 12, 60]
    return [" ".join(sentences[a:b]) for a, b in itertools.pairwise(cuts)]


def document(text: str) -> Document:
    return Document(name=text[:20], text=text)


def write(folder: Path) -> None:
    """Writes the task files, and the documents, into a folder."""
    documents = folder / "texts.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    for name, task, path in (
        ("facts", CHOICE, FACTS),
        ("facts_rolling", ROLLING, documents),
        ("facts_said", SAID, FACTS),
    ):
        (folder / f"{name}.yaml").write_text(task + SHARED.format(path=path))
