"""Makes sentencepiece_reference.npz: small models, and what SentencePiece itself does with texts.

Usage: python -m tests.data.sentencepiece_reference, in an environment with `sentencepiece`.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

FILE = Path(__file__).with_suffix(".npz")
SAID = """The quick brown fox jumps over the lazy dog, and the dog barks at 12:30.
Der schnelle braune Fuchs springt über den faulen Hund, während Käthe zählt: 1, 2, 3.
Быстрая коричневая лиса перепрыгнула через ленивую собаку.
敏捷的棕色狐狸跳过了懒狗。素早い茶色の狐がのろまな犬を飛び越えた。
الثعلب البني السريع يقفز فوق الكلب الكسول.
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।
빠른 갈색 여우가 게으른 개를 뛰어넘는다.
def f(x):\n    return x ** 2  # squares   x\n
Ｆｕｌｌ　ｗｉｄｔｈ, ﬁne ﬂags, ① ½ and №5."""  # noqa: RUF001
RULES = "".join(  # a character map of its own: the library's is twenty times as large as a model
    f"{ord(wide):X}\t{ord(wide) - 0xFEE0:X}\n" for wide in map(chr, range(0xFF01, 0xFF5F))
)
RULES += "3000\t20\nA\t20\n9\t20\nFB01\t66 69\nFB02\t66 6C\n65 301\tE9\n2116\t4E 6F\nAD\t\n"
KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"vocab_size": 300, "rules": True},
    "unigram_bytes": {"vocab_size": 520, "byte_fallback": True, "rules": True},
    "bpe": {"model_type": "bpe", "vocab_size": 300, "rules": True},
    "llama": {
        "model_type": "bpe",
        "vocab_size": 560,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "pad_id": 3,
    },
    "gemma": {
        "model_type": "bpe",
        "vocab_size": 580,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n", "\n\n", "▁▁", "▁▁▁", "<b>", "</b>"],
        "control_symbols": ["<start_of_turn>"],
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
    },
    "symbols": {
        "vocab_size": 320,
        "rules": True,
        "user_defined_symbols": ["<b>", "fox jumps"],
        "control_symbols": ["<turn>"],
    },
    "across": {"model_type": "bpe", "vocab_size": 330, "split_by_whitespace": False},
}


def texts() -> list[str]:
    """Real sentences, parts of them in random orders, spaces in all places, and odd ones."""
    random = np.random.default_rng(0)
    more = [" ", "  ", "\n\n", "e\u0301", "🎭", "<b>x</b>", "<turn>", "<0x41>", "aaaa"]
    words = [*SAID.split(" "), *more]
    mixed = ["".join(random.choice(words, size=40)) for _ in range(40)]
    spaced = [" " * i + "fox" + " " * j + "dog" + " " * i for i in range(4) for j in range(1, 4)]
    odd = ["", " ", "   ", "\n", "x▁", "▁ a", "<s>", "a<s></s><unk>b", "<start_of_turn>user\nhi"]
    runs = ["a" * i for i in range(1, 12)] + ["-" * 30, "0" * 30, "ab" * 20]
    return [*SAID.split("\n"), SAID, *mixed, *spaced, *odd, *runs]


def train(**options: Any) -> bytes:
    """A model of SAID; raises where the library does."""
    held = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        if options.pop("rules", False):
            rules = Path(folder) / "rules.tsv"
            rules.write_text(RULES)
            options["normalization_rule_tsv"] = str(rules)
        elif "normalization_rule_name" not in options:
            options["normalization_rule_name"] = "identity"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SAID.split("\n") * 3),
            model_writer=held,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return held.getvalue()


def main() -> None:
    """Writes the file."""
    said = texts()
    arrays: dict[str, np.ndarray] = {"texts": np.array(json.dumps(said))}
    for name, options in KINDS.items():
        model = train(**options)
        made = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = [made.encode(text) for text in said]
        arrays[f"{name}.model"] = np.frombuffer(model, np.uint8)
        arrays[f"{name}.ids"] = np.array([i for row in ids for i in row], np.uint16)
        arrays[f"{name}.lengths"] = np.array([len(row) for row in ids], np.uint16)
        arrays[f"{name}.decoded"] = np.array(json.dumps([made.decode(row) for row in ids]))
        names = {role: getattr(made, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        arrays[f"{name}.special"] = np.array(json.dumps(names))
    np.savez_compressed(FILE, **arrays)
    print(FILE.name, FILE.stat().st_size, {k: v.size for k, v in arrays.items()})


if __name__ == "__main__":
    main()
