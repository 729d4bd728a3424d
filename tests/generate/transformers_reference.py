"""Generation of Hugging Face transformers as a reference.

`python -m tests.generate.transformers_reference` (with the extra `parity`) writes
`transformers_reference.npz`: logits as its processors leave them, and greedy, penalised and beam
search texts of a small GPT-2 with the weights of it.
"""

from pathlib import Path

import numpy as np

from tests.models.gpt2_reference import from_torch_names

FILE = Path(__file__).with_name("transformers_reference.npz")
# temperature, top_k, top_p, min_p, repetition_penalty
SETTINGS = [
    (1.0, 0, 1.0, 0.0, 1.0),
    (0.7, 5, 1.0, 0.0, 1.0),
    (1.3, 0, 0.6, 0.0, 1.0),
    (1.0, 0, 1e-6, 0.0, 1.0),
    (1.0, 0, 1.0, 0.2, 1.0),
    (1.0, 0, 1.0, 1.0, 1.0),
    (0.8, 9, 0.8, 0.1, 1.4),
    (1.0, 0, 1.0, 0.0, 1.4),
    (1.0, 0, 0.9, 0.0, 0.7),
    (2.5, 60, 0.99, 0.3, 1.0),
]
# num_beams, max_tokens, length_penalty, end_id
BEAMS = [(3, 6, 1.0, 5), (3, 9, 0.0, 0), (4, 12, 2.0, 2), (4, 10, -1.0, 13), (4, 12, 1.0, -1)]
MODEL = {
    "num_layers": 2,
    "dim": 16,
    "num_heads": 2,
    "vocab_size": 20,
    "max_length": 32,
}
PENALTY = 1.5
MAX_TOKENS = 12


def processed_logits(logits, seen, settings):
    """Logits [B, V] after the processors of transformers; `seen` [B, T] holds earlier tokens."""
    import torch
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process

    temperature, top_k, top_p, min_p, penalty = settings
    chain = LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(penalty),
            logits_process.TemperatureLogitsWarper(temperature),
            *([logits_process.TopKLogitsWarper(min(top_k, logits.shape[1]))] if top_k else []),
            *([logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []),
            *([logits_process.MinPLogitsWarper(min_p)] if min_p else []),
        ]
    )
    return chain(torch.tensor(seen), torch.tensor(logits)).numpy()


def small_model(seed):
    """A GPT-2 of transformers, far from uniform."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=MODEL["num_layers"],
        n_embd=MODEL["dim"],
        n_head=MODEL["num_heads"],
        vocab_size=MODEL["vocab_size"],
        n_positions=MODEL["max_length"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a large bias would make one token of every text
            std = 0.6 if parameter.ndim > 1 else 0.1
            parameter.add_(std * torch.randn_like(parameter))
    return model


def our_weights(model):
    """Its weights by our paths."""
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return from_torch_names(weights, num_heads=MODEL["num_heads"])


def texts(model, prompts, **arguments):
    """What `generate` adds to prompts of unequal lengths, padded at the left."""
    import torch

    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), pad_token_id=0, **arguments
    )
    return output[:, longest:].numpy()


def beams(model, prompt, num_beams, max_tokens, length_penalty, end_id):
    """(texts, scores) of beam search, best first; -1 after a text's end."""
    import torch

    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        pad_token_id=0,
        eos_token_id=None if end_id < 0 else end_id,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=max_tokens,
        length_penalty=length_penalty,
        early_stopping="never",
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = np.full((num_beams, max_tokens), -1)
    for row, text in enumerate(output.sequences[:, len(prompt) :].numpy().tolist()):
        size = text.index(end_id) if end_id in text else len(text)
        found[row, :size] = text[:size]
    return found, output.sequences_scores.numpy()


def prompts():
    """Four prompts of unequal lengths."""
    random = np.random.default_rng(0)
    return [random.integers(0, MODEL["vocab_size"], size).tolist() for size in (1, 9, 4, 6)]


def make():
    """Writes the file."""
    random = np.random.default_rng(1)
    logits = (2 * random.normal(size=(4, 50))).astype(np.float32)
    seen = random.integers(0, 50, (4, 12))
    model = small_model(2)
    searches = {}
    for number, case in enumerate(BEAMS):
        found, scores = beams(model, prompts()[number % 4], *case)
        searches |= {f"beams_{number}": found, f"scores_{number}": scores}
    np.savez_compressed(
        FILE,
        logits=logits,
        seen=seen,
        processed=np.stack([processed_logits(logits, seen, case) for case in SETTINGS]),
        greedy=texts(model, prompts(), max_new_tokens=MAX_TOKENS, do_sample=False),
        penalised=texts(
            model,
            prompts()[1:2],
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            repetition_penalty=PENALTY,
        ),
        **searches,
        **{f"weights/{path}": x for path, x in our_weights(model).items()},
    )


if __name__ == "__main__":
    make()
