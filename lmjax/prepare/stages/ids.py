"""Numbers by which states know persons, found by their form and their check.

Only numbers that carry a check, or letters in fixed places, are looked for: what has none, as nine
digits in a row, is no more an id than any other number.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator

_EDGE = r"(?<![\w.-])(?:{})(?![\w-]|\.\d)"
# What a text needs to hold any of them, for Arrow (RE2).
HINT = (
    r"\d{3}\.\d{3}\.\d{3}-\d\d|\d{17}[\dXx]|[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?\d[\dAB] ?\d{3} ?\d{3}"
    r"|[A-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-D]|[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]"
    r"|(?:\d|[XYZ]-?)\d{7}-?[A-Z]"
)


def find(text: str) -> Iterator[tuple[int, int]]:
    """Where the ids of a text stand, (begin, end) each; none overlaps another."""
    end = 0
    spans = [m.span() for form, check in _IDS for m in form.finditer(text) if check(m[0])]
    for span in sorted(spans):
        if span[0] >= end:
            yield span
            end = span[1]


def _is_cpf(text: str) -> bool:
    """Brazil, 123.456.789-09: two digits are checks of those before, modulo 11."""
    digits = [int(c) for c in text if c.isdigit()]
    if len(set(digits)) == 1:
        return False
    for size in (9, 10):
        rest = sum(d * w for d, w in zip(digits, range(size + 1, 1, -1), strict=False)) * 10 % 11
        if rest % 10 != digits[size]:
            return False
    return True


def _is_resident(text: str) -> bool:
    """China, region, date of birth, order and a check (GB 11643, ISO 7064 MOD 11-2)."""
    total = sum(int(c) * (1 << (17 - i)) for i, c in enumerate(text[:17]))
    return _is_date(text[6:14]) and "10X98765432"[total % 11] == text[17].upper()


def _is_nir(text: str) -> bool:
    """France, sex, year, month, department, commune, order, and 97 less the remainder by 97."""
    plain = text.replace(" ", "").replace("2A", "19").replace("2B", "18")
    return plain.isdigit() and int(plain[13:]) == 97 - int(plain[:13]) % 97


def _is_nino(text: str) -> bool:
    """Great Britain, AB 12 34 56 C: letters that are given out."""
    return text[:2] not in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")


def _is_fiscal(text: str) -> bool:
    """Italy, 16 characters of which the last is a check of those before."""
    odd = dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21), strict=True))
    letters = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25)
    odd |= dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", (*letters, 24, 23), strict=True))
    even = {c: int(c) if c.isdigit() else ord(c) - ord("A") for c in odd}
    total = sum((even if i % 2 else odd)[c] for i, c in enumerate(text[:15]))
    return chr(ord("A") + total % 26) == text[15]


def _is_dni(text: str) -> bool:
    """Spain, eight digits (X, Y, Z stand for 0, 1, 2) and a letter: the remainder by 23."""
    plain = text.replace("-", "")
    number = plain[:8].translate(str.maketrans("XYZ", "012"))
    return plain[8] == "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]


def _is_date(text: str) -> bool:
    try:
        return 1900 <= datetime.datetime.strptime(text, "%Y%m%d").year <= 2100
    except ValueError:
        return False


_IDS: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = tuple(
    (re.compile(_EDGE.format(form)), check)
    for form, check in (
        (r"\d{3}\.\d{3}\.\d{3}-\d\d", _is_cpf),
        (r"[1-9]\d{16}[\dXx]", _is_resident),
        (
            r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d",
            _is_nir,
        ),
        (r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]", _is_nino),
        (r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", _is_fiscal),
        (r"(?:\d{8}|[XYZ]-?\d{7})-?[A-Z]", _is_dni),
    )
)
