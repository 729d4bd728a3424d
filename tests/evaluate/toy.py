"""A decoder whose logits a few lines of numpy repeat, and a tokenizer that merges."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lmjax.core import DecoderOutput, Unembedding
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.generate.language_model import LanguageModel

DIM = 6


@dataclass(frozen=True)
class Toy:
    """Hidden state: the last token's embedding and the mean of all so far, so the start counts."""

    vocab_size: int = 257
    max_length: int = 40

    def init(self, rng, tokens_BT):
        tables = jax.random.normal(rng, (2, self.vocab_size, DIM))
        return {"params": {"embed": tables[0], "unembed": tables[1]}}

    def apply(self, variables, tokens_BT):
        embed, unembed = variables["params"]["embed"], variables["params"]["unembed"]
        x_BTD = embed[tokens_BT]
        count_1T1 = jnp.arange(1, x_BTD.shape[1] + 1)[None, :, None]
        hidden_BTD = x_BTD + jnp.cumsum(x_BTD, axis=1) / count_1T1
        return DecoderOutput(hidden_BTD, Unembedding(unembed, self.vocab_size))


def variables(seed=0):
    tables = np.random.default_rng(seed).normal(size=(2, 257, DIM)).astype(np.float32)
    return {"params": {"embed": tables[0], "unembed": tables[1]}}


def logprobs(variables, context):
    """What the toy says of the token after a context: numpy, one context at a time, float64."""
    embed, unembed = (np.asarray(variables["params"][k], np.float64) for k in ("embed", "unembed"))
    x = embed[np.asarray(context)]
    logits = unembed @ (x[-1] + x.mean(0))
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


class Decoding:
    """Draws by the toy's own numbers, without anything compiled; in the place of the real one."""

    def rows(self, count):
        return count

    def batch(self, weights, prompts, *, max_tokens, seeds, end_ids, done, temperature):
        texts = [list(prompt) for prompt in prompts]
        for step in range(max_tokens):
            for row, text in enumerate(texts):
                if row in done:
                    continue
                noise = np.random.default_rng((seeds[row], step)).gumbel(size=257)
                token = int((logprobs(weights.stacked, text) + temperature * noise).argmax())
                if token in end_ids:
                    done.add(row)
                    continue
                text.append(token)
                yield row, token


def language_model(tokenizer=None, max_length=40, seed=0):
    model = Toy(max_length=max_length)
    return LanguageModel(
        model=model,
        variables=variables(seed),
        tokenizer=tokenizer or ByteTokenizer(),
        decoding=Decoding(),
        step=0,
    )


def merging_tokenizer(*, bos=False):
    """Bytes, the merges " a" and "ab", an end, and bos before a text where it is asked for."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:200]
    alphabet += [c for c in "abcdefgh\u0120\u010a" if c not in alphabet]
    vocab = {c: i for i, c in enumerate([*alphabet, "\u0120a", "ab", "<s>", "</s>"])}
    merges = [("\u0120", "a"), ("a", "b")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return SubwordTokenizer(
        tokenizer_json=made.to_str(),
        vocab_size=len(vocab),
        end_id=vocab["</s>"],
        special_tokens=(("bos_token", "<s>"), ("eos_token", "</s>")) if bos else (),
    )
