"""Each rule against a plain implementation that looks at one document at a time."""

import random
import re
from collections import Counter

import pytest

from lmjax.errors import UserError
from lmjax.prepare.stages import rules
from lmjax.prepare.stages.repetition import Repetition
from tests.prepare.stages import drive, texts

LIMITS = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def stripped(parts: list[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]


def slow_repeats(parts: list[str]) -> tuple[float, float]:
    seen: set[str] = set()
    again = characters = 0
    for part in parts:
        if part in seen:
            again += 1
            characters += len(part)
        seen.add(part)
    return again / max(len(parts), 1), characters / max(sum(map(len, parts)), 1)


def slow_ngram(text: str, n: int) -> float:
    """The top n-gram's share for n up to 4, else that of words in n-grams that stand twice."""
    found = text.split()
    total = max(sum(map(len, found)), 1)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    counts = Counter(grams)
    if n <= 4:
        often = [(count, sum(map(len, gram))) for gram, count in counts.items() if count > 1]
        count, size = max(often, default=(0, 0))
        return count * size / total
    covered = {i + k for i, gram in enumerate(grams) if counts[gram] > 1 for k in range(n)}
    return sum(len(found[i]) for i in covered) / total


def slow_repetition(text: str) -> list[str]:
    lines, line_characters = slow_repeats(stripped(text.split("\n")))
    blocks, block_characters = slow_repeats(stripped(text.split("\n\n")))
    broken = {
        "duplicate_lines": lines > 0.30,
        "duplicate_paragraphs": blocks > 0.30,
        "duplicate_line_characters": line_characters > 0.20,
        "duplicate_paragraph_characters": block_characters > 0.20,
    }
    for n, limit in LIMITS.items():
        name = f"top_{n}gram" if n <= 4 else f"duplicate_{n}grams"
        broken[name] = slow_ngram(text, n) > limit
    return [name for name, is_broken in broken.items() if is_broken]


def slow_gopher(text: str) -> list[str]:
    found, lines = text.split(), stripped(text.split("\n"))
    count, num_lines = len(found), max(len(lines), 1)
    divisor = max(count, 1)
    length = sum(map(len, found)) / divisor
    broken = {
        "min_words": count < 50,
        "max_words": count > 100_000,
        "min_mean_word_length": length < 3,
        "max_mean_word_length": length > 10,
        "max_hash_ratio": text.count("#") / divisor > 0.1,
        "max_ellipsis_ratio": (text.count("...") + text.count("…")) / divisor > 0.1,
        "max_bullet_lines": sum(
            x[0] in "\u2022\u2023\u2043\u25e6\u25aa\u25cf*-\u2013\u2014\u00b7" for x in lines
        )
        / num_lines
        > 0.9,
        "max_ellipsis_lines": sum(bool(re.search(r"(\.\.\.|…)$", x)) for x in lines) / num_lines
        > 0.3,
        "min_alphabetic_words": sum(any(c.isalpha() for c in w) for w in found) / divisor < 0.8,
        "min_stop_words": len(set(found) & set(rules.STOP_WORDS)) < 2,
    }
    return [name for name, is_broken in broken.items() if is_broken]


def slow_fineweb(text: str) -> list[str]:
    lines = stripped(text.split("\n"))
    count = max(len(lines), 1)
    ends = ".!?\"\u201d'\u2019\u2026\u3002\uff01\uff1f\u061f\u06d4\u0964"
    broken = {
        "min_punctuated_lines": sum(line[-1] in ends for line in lines) / count <= 0.12,
        "max_duplicate_line_characters": slow_repeats(lines)[1] >= 0.1,
        "max_short_lines": sum(len(line) < 30 for line in lines) / count >= 0.67,
    }
    return [name for name, is_broken in broken.items() if is_broken]


def slow_c4(text: str) -> tuple[str, str | None]:
    small = text.lower()
    text = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", text, flags=re.I)
    kept = []
    for line in text.split("\n"):
        line = line.strip()
        if not line or line[-1] not in '.!?"' or line.endswith("...") or len(line.split()) < 5:
            continue
        if any(x in line.lower() for x in ("javascript", *rules.POLICIES)):
            continue
        kept.append(line)
    out = "\n".join(kept)
    if "lorem ipsum" in small or "{" in small:
        return out, "drop_pages_with"
    ends = re.findall(r"[.!?]+[\"')\]\u201d\u2019]*(?:\s|$)", out)
    return out, "min_sentences" if len(ends) < 3 else None


def spoiled(documents: list[str], seed: int = 0) -> list[str]:
    """The documents, with repetitions, symbols, bullets and marks put into most of them."""
    draw = random.Random(seed)
    out = ["", "one", "\n\n", "the the the the", "and - that"]
    for text in documents:
        lines = text.split("\n")
        some = draw.choice(lines), " ".join(text.split()[: draw.randint(1, 12)])
        for _ in range(draw.choice([0, 0, 1, 10, 100])):
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(some))
        ways = ["", "", "# ", "- ", "• ", "12 34 5 ", "[3] ", "javascript ", "{ ", "Lorem Ipsum "]
        mark, end = draw.choice(ways), draw.choice(["", "", "...", "…", ".", " [citation needed]."])
        share = draw.choice([0.02, 0.5, 0.95])
        out.append(
            "\n".join(f"{mark}{x}{end}" if draw.random() < share else x for x in lines)
            if draw.random() < 0.9
            else " ".join(draw.choice(lines).split()[:3] * 20)
        )
    return out


def agree(documents: list[str]) -> Counter[str]:
    """All stages on the documents, each record and count against the plain implementation."""
    table = drive.records(documents)
    every: Counter[str] = Counter()
    for stage, slow in (
        (rules.GopherQuality(), slow_gopher),
        (Repetition(), slow_repetition),
        (rules.FineWeb(), slow_fineweb),
    ):
        result = drive.check(table, stage(table))
        broken = [slow(text) for text in documents]
        reasons = dict(
            zip(result.dropped["id"].to_pylist(), result.dropped["reason"].to_pylist(), strict=True)
        )
        expected = {
            name: names[0]
            for name, names in zip(table["id"].to_pylist(), broken, strict=True)
            if names
        }
        assert reasons == expected
        counts = Counter(f"breaks {name}" for names in broken for name in names)
        assert {name: count for name, count in result.counts.items() if count} == counts
        every += counts
    result = drive.check(table, rules.C4()(table))
    slow_pages = [slow_c4(text) for text in documents]
    assert result.kept["text"].to_pylist() == [text for text, why in slow_pages if why is None]
    assert result.dropped["reason"].to_pylist() == [why for _, why in slow_pages if why]
    return every + Counter(result.dropped["reason"].to_pylist())


def test_rules_on_spoiled_plays():
    found = agree(spoiled(texts.plays()[::25]))
    assert len(found) >= 20, found  # nearly every rule is broken somewhere


@pytest.mark.slow
def test_rules_on_real_documents():
    pages = [*texts.kernel_pages()[::4], *texts.help_pages()[:100], *texts.mail_bodies()[::8]]
    found = agree(pages)
    assert len(found) >= 20, found


def test_a_threshold_of_none_leaves_its_rule_out():
    table = drive.records(["too short"])
    assert len(rules.GopherQuality()(table).kept) == 0
    open_ = rules.GopherQuality(min_words=None, min_stop_words=None)
    assert len(open_(table).kept) == 1
    assert "breaks min_words" not in open_(table).counts
    assert len(rules.FineWeb(max_short_lines=None, min_punctuated_lines=None)(table).kept) == 1


def test_bad_words_are_whole_words():
    table = drive.records(
        ["A classic text. It is fine. It is good.", "An ass is a donkey. So. It."]
    )
    stage = rules.C4(bad_words=("ass",), min_sentences=None, terminal=(), min_line_words=0)
    result = drive.check(table, stage(table))
    assert result.dropped.to_pylist() == [
        {"id": "s/file#1", "reason": "bad_words", "detail": "ass"}
    ]


def broken_by(stage: object, text: str) -> list[str]:
    return sorted(name[7:] for name, count in stage(drive.records([text])).counts.items() if count)


GOPHER_EDGES = [
    ("min_words", "w " * 50, "w " * 49),
    ("max_words", "w " * 100_000, "w " * 100_001),
    ("min_mean_word_length", "aaa bb cccc", "aaa bb ccc"),
    ("max_mean_word_length", "a" * 10, "a" * 11),
    ("max_hash_ratio", "a " * 9 + "#", "a " * 8 + "#"),
    ("max_ellipsis_ratio", "a " * 9 + "...", "a " * 8 + "\u2026"),
    ("max_bullet_lines", "- a\n" * 9 + "a", "- a\n" * 10 + "a"),
    ("max_ellipsis_lines", "a...\n" * 3 + "a\n" * 7, "a...\n" * 4 + "a\n" * 9),
    ("min_alphabetic_words", "a a a a 1", "a a a 1"),
    ("min_stop_words", "the of of", "the the"),
]


@pytest.mark.parametrize(
    ("threshold", "inside", "outside"), GOPHER_EDGES, ids=[edge[0] for edge in GOPHER_EDGES]
)
def test_gopher_at_its_thresholds(threshold, inside, outside):
    assert threshold not in broken_by(rules.GopherQuality(), inside)
    assert threshold in broken_by(rules.GopherQuality(), outside)


FINEWEB_EDGES = [
    ("min_punctuated_lines", "a.\n" * 4 + "a\n" * 21, "a.\n" * 3 + "a\n" * 22),
    (
        "max_duplicate_line_characters",
        "".join(f"line {i}\n" for i in range(10)) + "line 0",
        "".join(f"line {i}\n" for i in range(9)) + "line 0",
    ),
    (
        "max_short_lines",
        f"{'a' * 29}\n" * 66 + f"{'a' * 30}\n" * 34,
        f"{'a' * 29}\n" * 67 + f"{'a' * 30}\n" * 33,
    ),
]


@pytest.mark.parametrize(
    ("threshold", "inside", "outside"), FINEWEB_EDGES, ids=[edge[0] for edge in FINEWEB_EDGES]
)
def test_fineweb_drops_at_its_thresholds(threshold, inside, outside):
    assert threshold not in broken_by(rules.FineWeb(), inside)
    assert threshold in broken_by(rules.FineWeb(), outside)


def test_the_released_rule_of_newlines():
    documents = ["one two three\n" * 9, "a b\n\nc d\n" * 9, "", "one line of words"]
    table = drive.records(documents)
    off = {"min_punctuated_lines": None, "max_duplicate_line_characters": None}
    stage = rules.FineWeb(**off, max_short_lines=None, max_newlines_per_word=0.33)
    result = drive.check(table, stage(table))
    newlines = [len(stripped(x.split("\n"))) - 1 for x in documents]
    broken = [n / max(len(x.split()), 1) > 0.33 for n, x in zip(newlines, documents, strict=True)]
    assert [f"s/file#{i}" in result.dropped["id"].to_pylist() for i in range(4)] == broken
    assert broken == [False, True, False, False]


def test_lines_with_endless_words_are_cut():
    table = drive.records([f"a b c d {'x' * 1001}\na b c d {'x' * 1000}\n{'中' * 2000}"])
    stage = rules.C4(terminal=(), min_sentences=None, min_line_words=0)
    assert len(stage(table).kept["text"][0].as_py()) == 1008 + 1 + 2000
    assert stage(table).counts["lines cut by max_word_length"] == 1


CHINESE = "委员会将于星期四开会\uff0c讨论上周没有解决的问题\u3002"
THAI = "คณะกรรมการจะประชุมในวันพฤหัส"


@pytest.mark.parametrize("text", [CHINESE * 3, THAI * 3], ids=["Chinese", "Thai"])
def test_scripts_without_spaces(text):
    """Of one word each by spaces; by their script they have as many as letters, and are kept."""
    table = drive.records([text, text[:20]])
    found = drive.check(table, rules.GopherQuality()(table))
    assert found.dropped["reason"].to_pylist() == ["min_words"] * 2
    stage = rules.GopherQuality(words="script", min_mean_word_length=None, min_stop_words=None)
    result = drive.check(table, stage(table))
    assert result.kept["id"].to_pylist() == ["s/file#0"]
    assert result.dropped["reason"].to_pylist() == ["min_words"]
    said = drive.records([f"{text[:24]} {text[:24]}\uff0c"])
    assert len(Repetition()(said).kept) == 1
    (reason,) = Repetition(words="script")(said).dropped["reason"].to_pylist()
    assert "gram" in reason
    with pytest.raises(UserError, match="Allowed: script, spaces"):
        rules.GopherQuality(words="letters")


def test_code_and_prose_by_the_same_rules():
    """Code has few stop words and many symbols: English rules drop it, as its papers mean to."""
    code = "\n".join(f"    x_{i} = f(a[{i}], b) + {i}  # {i}" for i in range(40))
    table = drive.records([code])
    assert rules.GopherQuality()(table).dropped["reason"].to_pylist() == ["min_mean_word_length"]
    open_ = rules.GopherQuality(
        min_mean_word_length=None,
        max_hash_ratio=None,
        min_alphabetic_words=None,
        min_stop_words=None,
    )
    assert len(open_(table).kept) == 1


def test_an_empty_table_gives_an_empty_table():
    for stage in (rules.GopherQuality(), rules.FineWeb(), rules.C4(), Repetition()):
        assert len(stage(drive.records([])).kept) == 0
