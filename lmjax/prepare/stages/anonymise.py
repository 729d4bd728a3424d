"""What identifies a person, or opens a door, is replaced by a tag.

Each kind is found by its form, and where it has one by its check: Luhn's digit of card numbers, the
remainder of IBANs, the ranges of addresses, the numbering plans of telephones.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from lmjax.errors import UserError, did_you_mean
from lmjax.prepare.stage import Result, with_column
from lmjax.prepare.stages import ids

_EMAIL = re.compile(
    # an apostrophe before it is a quote, unless a letter stands before that; git@host:path is none
    r"(?<![\w.+%-])(?<!\w')(?!git@[\w.-]+:)[\w+%-][\w.+%'-]{0,63}"
    r"@(?:[^\W_](?:[^\W_]|-){0,62}\.)+[^\W\d_]{2,24}(?![^\W_]|@)"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
# What a number of four parts follows that is a version, a section or an object's identifier.
_VERSION = re.compile(
    r"(?:\b(?:version|ver\.?|v|release|rev(?:ision)?\.?|build|kernel|python|firmware|driver|sections?"
    r"|sec\.|chapter|table|figure|fig\.|oid)|\xa7)[\s:=]*$",
    re.I,
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
_NAMED_SSN = re.compile(
    r"\b(?:ssn|social security(?: number| no\.?)?)\W{0,3}(?:is )?"
    r"((?!000|666|9)\d{3} ?(?!00)\d\d ?(?!0000)\d{4})(?![\w-])",
    re.I,
)
# All digits in one run, or in the groups that stand on cards, with one kind of separator.
_CARD = re.compile(
    r"(?<![\w.-])(?:\d{13,19}|\d{4}([ .-])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ .-])\d{6}\2\d{4,5})"
    r"(?![\w-]|\.\d)"
)
# Issuers and lengths: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay, Maestro.
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?=\d{16}$)(?:5[1-5]|22[2-9]|2[3-6]\d|27[01])\d*|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|35\d{14}|62\d{14,17}|(?:5018|5020|5038|6304|6759|676[1-3])\d{8,15}"
)
# Runs of digits as telephone numbers have them; which of them are numbers is looked up.
_PHONE = re.compile(
    r"(?:(?<![\w.,/:=#-])|(?<=[^\W\d_]:)|(?<=[:=/])(?=\(?\+))"
    r"(?:\(?\+|\()?\d(?:[ \t().\-/\xa0\u2010-\u2013]{0,2}\d){6,15}"
    r"(?![\w/=]|[.,:-]\d)"
)
_NO_GAPS = str.maketrans("", "", " .-")
_DECIMAL = re.compile(r"\d+\.\d+")
_CALL = re.compile(
    r"(?:tel|phone|ph|call|fax|mobile|cell|whatsapp|sms|dial|contact)\W{0,4}(?:\w+\W{1,3}){0,3}$",
    re.I,
)
_SECRETS = (
    re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:.{0,20000}?-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|[\s\w+/=:,-]*)",
        re.S,
    ),
    re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),  # JSON web tokens
    re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA|AROA|AIDA)[A-Z2-7]{16}(?![A-Za-z0-9])"),  # AWS
    re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{30,})"),
    re.compile(r"(?<![A-Za-z0-9])(?:glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{35})"),
    re.compile(
        r"(?<![A-Za-z0-9])(?:[rs]k_live_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,})"
    ),
    re.compile(
        r"(?<![A-Za-z0-9])(?:SG\.[\w-]{16,32}\.[\w-]{32,64}|npm_[A-Za-z0-9]{36}|pypi-AgEI[\w-]{50,}"
        r"|hooks\.slack\.com/services/T\w+/B\w+/\w{20,})"
    ),
)
_ASSIGNED = re.compile(
    r"(?:api[_-]?key|secret|token|passw(?:or)?d|access[_-]?key|credentials?)\w{0,12}[\"']?\s{0,3}[:=]\s{0,3}"
    r"[\"']?([\w/+=.~-]{16,200})|\bbearer\s([\w/+=.~-]{16,200})",
    re.I,
)
# What a text needs to hold any of a kind. Arrow's expressions (RE2) read 600 MB/s, so that the
# exact forms are looked for in few texts.
_HINTS = {
    "secret": r"PRIVATE KEY|eyJ[\w-]{8}|A(?:KIA|SIA|ROA|IDA|Iza)|gh[pousr]_|github_pat_|glpat-|xox"
    r"|k_live_|sk-\w|hf_\w|SG\.|npm_|pypi-|hooks\.slack|(?i:bearer\s\w|(?:key|secret|token|passw\w{0,3}|credentials?)\w{0,12}[\"']?\s{0,3}"
    r"[:=]\s{0,3}[\"']?[\w/+=.~-]{16})",
    "email": "@",
    "iban": r"[A-Z]{2}\d\d ?[A-Z0-9]{4} ?[A-Z0-9]{4}",
    "card": r"\d{13}|\d{4}[ .-]\d{4,6}[ .-]\d{4}",
    "ssn": r"\d{3}-\d\d-\d{4}|(?i:ssn|social security)",
    "id": ids.HINT,
    "ip": r"\d\.\d{1,3}\.\d{1,3}\.\d|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:",
    "phone": r"\d(?:[ \t().\-/\x{a0}\x{2010}-\x{2013}]{0,2}\d){6}",
}
_PRIVATE_HINT = r"\d\.\d{1,3}\.\d{1,3}\.\d|:[0-9A-Fa-f]{0,4}:"


@dataclass(frozen=True, kw_only=True)
class Anonymise:
    """Replaces personal data and secrets by tags: <EMAIL>, <PHONE>, <IP>, <IBAN>, <SSN>, ...

    Args:
      kinds: of "secret" (keys, tokens, passwords that look random), "email", "iban", "card", "ssn"
        (of the United States), "id" (of Brazil, China, France, Great Britain, Italy and Spain,
        whose check is right), "ip", "phone".
      regions: countries (ISO 3166) whose telephone numbers are known without a "+"; one of digits
        alone counts only after a word like "call".
      private_ips: replaces addresses too that lead nowhere from outside: private, loopback.
      meta: replaces in the strings of `meta` as well: a mail's sender, an address in a URL.
    """

    kinds: Sequence[str] = ("secret", "email", "iban", "card", "ssn", "id", "ip", "phone")
    regions: Sequence[str] = ("US",)
    private_ips: bool = False
    meta: bool = True

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in _FINDERS:
                raise UserError(f"kinds: {kind!r}." + did_you_mean(kind, _FINDERS))

    def __call__(self, records: pa.Table) -> Result:
        """Replaces; counts what is replaced by kind, and the records that hold any."""
        counts: Counter[str] = Counter()
        texts = records["text"].to_pylist()
        changed = set()
        for kind, finder in self._finders():
            for i in self._hinted(records["text"], kind):
                if spans := list(finder(texts[i], self)):
                    texts[i] = _replaced(texts[i], spans, f"<{kind.upper()}>")
                    counts[f"{kind} replaced"] += len(spans)
                    changed.add(i)
        counts["records changed"] = len(changed)
        records = with_column(records, "text", pa.array(texts, pa.large_string()))
        if self.meta:
            records = self._in_meta(records, counts)
        return Result(kept=records, counts=dict(sorted(counts.items())))

    def _finders(self) -> list[tuple[str, Finder]]:
        """The kinds that are looked for, in an order in which none takes a part of another."""
        return [(kind, finder) for kind, finder in _FINDERS.items() if kind in self.kinds]

    def _hinted(self, column: pa.ChunkedArray, kind: str) -> list[int]:
        """The rows that may hold any of a kind."""
        hint = _PRIVATE_HINT if kind == "ip" and self.private_ips else _HINTS[kind]
        found: list[int] = np.flatnonzero(
            pc.match_substring_regex(column, hint).to_numpy(zero_copy_only=False)
        ).tolist()
        return found

    def _in_meta(self, records: pa.Table, counts: Counter[str]) -> pa.Table:
        rows = {i for kind, _ in self._finders() for i in self._hinted(records["meta"], kind)}
        if not rows:
            return records
        metas = records["meta"].to_pylist()
        for i in sorted(rows):
            metas[i] = orjson.dumps(self._in_tree(orjson.loads(metas[i]), counts)).decode()
        return with_column(records, "meta", pa.array(metas, pa.string()))

    def _in_tree(self, tree: Any, counts: Counter[str]) -> Any:
        """What JSON holds, with strings replaced; names of fields stay."""
        if isinstance(tree, dict):
            return {name: self._in_tree(value, counts) for name, value in tree.items()}
        if isinstance(tree, list):
            return [self._in_tree(value, counts) for value in tree]
        if isinstance(tree, str):
            for kind, finder in self._finders():
                if spans := list(finder(tree, self)):
                    tree = _replaced(tree, spans, f"<{kind.upper()}>")
                    counts[f"{kind} replaced in meta"] += len(spans)
        return tree


Spans = Iterator[tuple[int, int]]


def find_secrets(text: str, _: Anonymise) -> Spans:
    """Private keys, tokens with a known form, and values that look random after "key=" or so."""
    found = [match.span() for form in _SECRETS for match in form.finditer(text)]
    for match in _ASSIGNED.finditer(text):
        group = 2 if match[1] is None else 1
        if _looks_random(match[group]):
            found.append(match.span(group))
    end = 0
    for span in sorted(found):
        if span[0] >= end:
            yield span
            end = span[1]


def find_emails(text: str, _: Anonymise) -> Spans:
    """Addresses with a domain of letters."""
    yield from (match.span() for match in _EMAIL.finditer(text))


def find_ibans(text: str, _: Anonymise) -> Spans:
    """Account numbers whose remainder by 97 is right (ISO 13616)."""
    for match in _IBAN.finditer(text):
        plain = match[0].replace(" ", "")
        number = "".join(str(int(c, 36)) for c in plain[4:] + plain[:4])
        if 15 <= len(plain) <= 34 and int(number) % 97 == 1:
            yield match.span()


def find_cards(text: str, _: Anonymise) -> Spans:
    """Card numbers: an issuer's prefix and length, and Luhn's check digit (ISO/IEC 7812)."""
    for match in _CARD.finditer(text):
        digits = match[0].translate(_NO_GAPS)
        if _ISSUER.fullmatch(digits) and luhn(digits):
            yield match.span()


def find_ssns(text: str, _: Anonymise) -> Spans:
    """Social security numbers of the United States: 123-45-6789, or named so and without dashes."""
    yield from (match.span() for match in _SSN.finditer(text))
    yield from (match.span(1) for match in _NAMED_SSN.finditer(text))


def find_ids(text: str, _: Anonymise) -> Spans:
    """Numbers of persons of six more countries, see `ids`."""
    yield from ids.find(text)


def find_ips(text: str, stage: Anonymise) -> Spans:
    """IPv4 and IPv6 addresses that are reachable; what follows the word "version" is none."""
    for match in _IPV4.finditer(text):
        before = text[max(match.start() - 12, 0) : match.start()]
        if not _VERSION.search(before) and _is_address(match[0], stage.private_ips):
            yield match.span()
    for match in _IPV6.finditer(text):
        # "a::" and "1:2:3:4:5:6:7:8" are addresses too, but in code and examples alone
        groups = [group for group in match[0].split(":") if group]
        if (
            stage.private_ips or (len(groups) >= 3 and match[0][0] in "23" and len(groups[0]) == 4)
        ) and _is_address(match[0], stage.private_ips):
            yield match.span()


def find_phones(text: str, stage: Anonymise) -> Spans:
    """Numbers that some plan of numbering knows; raises UserError without phonenumbers."""
    for match in _PHONE.finditer(text):
        number = match[0]
        before = text[max(match.start() - 40, 0) : match.start()]
        if _DECIMAL.fullmatch(number) or (number.isdigit() and not _CALL.search(before)):
            continue
        if _is_phone(number.strip(), tuple(stage.regions)):
            yield match.span()


Finder = Callable[[str, Anonymise], Spans]
_FINDERS: dict[str, Finder] = {
    "secret": find_secrets,
    "email": find_emails,
    "iban": find_ibans,
    "card": find_cards,
    "ssn": find_ssns,
    "id": find_ids,
    "ip": find_ips,
    "phone": find_phones,
}


def luhn(digits: str) -> bool:
    """Whether the last digit is Luhn's check of the others (ISO/IEC 7812-1, annex B)."""
    total = sum(map(int, digits[-1::-2]))
    total += sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return total % 10 == 0


def _is_address(text: str, private: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return private or address.is_global


@functools.lru_cache(maxsize=1 << 14)
def _is_phone(number: str, regions: tuple[str, ...]) -> bool:
    try:
        import phonenumbers
    except ImportError as error:
        raise UserError(
            "finding telephone numbers needs `pip install phonenumbers` (lmjax[prepare])."
        ) from error
    abroad, leniency = number.lstrip("(").startswith("+"), phonenumbers.Leniency.STRICT_GROUPING
    if number.startswith("00"):  # as most countries dial out
        number, abroad = f"+{number[2:].lstrip()}", True
    if abroad:  # said to be a number: the digits of its country decide, not their groups
        leniency = phonenumbers.Leniency.VALID
    for region in (None,) if abroad else regions:
        found = phonenumbers.PhoneNumberMatcher(number, region, leniency=leniency, max_tries=4)
        if any(match.end - match.start >= len(number) - 2 for match in found):
            return True
    return False


def _looks_random(value: str) -> bool:
    """Letters and two digits at more than 3.3 bits a character: words and paths have fewer.

    One digit is enough where capitals and small letters are mixed at more than 4.2 bits.
    """
    num_digits = sum(c.isdigit() for c in value)
    if not num_digits or not any(c.isalpha() for c in value):
        return False
    share = [count / len(value) for count in Counter(value).values()]
    bits = -sum(p * math.log2(p) for p in share)
    mixed = any(c.isupper() for c in value) and any(c.islower() for c in value)
    return bits > (3.3 if num_digits >= 2 else 4.2 if mixed else math.inf)


def _replaced(text: str, spans: Sequence[tuple[int, int]], tag: str) -> str:
    parts, end = [], 0
    for begin, stop in sorted(spans):
        parts += [text[end:begin], tag]
        end = stop
    return "".join([*parts, text[end:]])
