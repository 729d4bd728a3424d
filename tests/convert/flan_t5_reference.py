"""What transformers makes of prompts with a FLAN-T5 small; needs torch and the published weights.

`python -m tests.convert.flan_t5_reference` (with the extra `parity`, and the package
traceforge-title-model, see tests/data/published.py) writes `flan_t5_reference.json`: for each
prompt its ids, the ids that greedy decoding writes, and what a search finds, with its scores.
"""

import json
import tempfile
from pathlib import Path

from tests.convert import onnx_t5
from tests.data.published import folder_of

PATH = Path(__file__).with_name("flan_t5_reference.json")
PROMPTS = (
    "translate English to German: The house is wonderful.",
    "translate English to French: My name is Wolfgang and I live in Berlin.",
    "summarize: The quick brown fox jumped over the lazy dog, and then it ran away into the woods "
    "because it was afraid.",
)
MAX_TOKENS, BEAMS = 40, 3


def package():
    """Where the package has its weights; skips a test where it is not installed."""
    return folder_of("traceforge_title_model") / "data" / "span"


def measure(folder):
    """What the stored file holds, of a folder that `onnx_t5.write_folder` wrote."""
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    found = []
    for prompt in PROMPTS:
        source = tokenizer(prompt).input_ids
        ids = torch.as_tensor([source])
        how = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
        greedy = model.generate(ids, **how)[0].tolist()
        beams = model.generate(
            ids,
            **how,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            early_stopping="never",
            output_scores=True,
            return_dict_in_generate=True,
        )
        found.append(
            {
                "prompt": prompt,
                "source": source,
                "greedy": cut(greedy),
                "text": tokenizer.decode(cut(greedy)),
                "beams": [cut(row) for row in beams.sequences.tolist()],
                "scores": beams.sequences_scores.tolist(),
            }
        )
    return found


def cut(row):
    """A text without its start, and without its end and what pads it."""
    return row[1 : row.index(1)] if 1 in row else row[1:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        texts = measure(onnx_t5.write_folder(package(), Path(made)))
    PATH.write_text(json.dumps(texts, indent=1) + "\n")
