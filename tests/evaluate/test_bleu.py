"""BLEU: by hand, and as sacreBLEU has it."""

import math
import random

import pytest

from lmjax.errors import UserError
from lmjax.evaluate.bleu import corpus_bleu, tokens_of

TEXT = (
    "the cat sat on 3.14 1,000 U.S. e.g. a-b 3-4 Don't (well) [x] {y} a/b x@y #1 $5 50% a_b &quot; "
    "&amp; &lt;i&gt; <skipped> , . ; : ! ? ... -- \u00fcber Gr\u00f6\u00dfe \u201eZitat\u201c "
    "\u2014 \u2026 ' \" ^ ` ~ | \\ + [] -& a&b"
)
PIECES = TEXT.split(" ")


def test_by_hand():
    """Precisions 5/6, 3/5, 1/4 and 1/(2 * 3); as long as the reference."""
    bleu = corpus_bleu(["the cat sat in the hat"], ["the cat sat at the hat"])
    expected = (100 * 5 / 6, 100 * 3 / 5, 100 / 4, 100 / 6)
    assert bleu.precisions == pytest.approx(expected)
    assert bleu.score == pytest.approx(math.prod(expected) ** 0.25)
    assert corpus_bleu(["a b c d"], ["a b c d e f"]).brevity == pytest.approx(math.exp(-0.5))


def test_ends():
    assert corpus_bleu(["a b c d e"], ["a b c d e"]).score == pytest.approx(100)
    assert corpus_bleu(["x"], ["a b c d e"]).score == 0
    assert corpus_bleu([""], ["a"]).score == 0
    with pytest.raises(UserError, match="1 translations for 2 references"):
        corpus_bleu(["a"], ["a", "b"])


def test_tokens():
    expected = ["a-b", ",", "3.14", ",", "1,000", ".", "<", "i", ">", '"']
    assert tokens_of("a-b, 3.14, 1,000. &lt;i&gt; &quot;") == expected
    assert tokens_of("\u6587\u672c ab\u3002", by_character=True)[:3] == ["\u6587", "\u672c", "ab"]


def test_is_sacrebleus():
    """Of texts of all that its tokenizer treats apart, and of near copies of them."""
    sacrebleu = pytest.importorskip("sacrebleu")
    draw = random.Random(0)
    for size in (1, 3, 40):
        references = [
            draw.choice(["", " "]).join(draw.choices(PIECES, k=draw.randint(1, 25)))
            for _ in range(size)
        ]
        ours = []
        for reference in references:
            words = [w for w in reference.split(" ") if draw.random() > 0.2]
            ours.append(" ".join(words + draw.choices(PIECES, k=draw.randint(0, 3))))
        expected = sacrebleu.corpus_bleu(ours, [references])
        found = corpus_bleu(ours, references)
        assert found.score == pytest.approx(expected.score, abs=1e-9)
        assert found.precisions == pytest.approx(expected.precisions, abs=1e-9)
        assert found.brevity == pytest.approx(expected.bp, abs=1e-12)
