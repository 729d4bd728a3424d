"""Pairs of paragraphs from the help pages of LibreOffice in two languages, as .jsonl.

    apt-get download libreoffice-help-en-us libreoffice-help-de   # MPL-2.0
    for file in libreoffice-help-*.deb; do dpkg -x "$file" help; done
    python scripts/help_pairs.py help/usr/share/libreoffice/help en-US de > pairs.jsonl

A paragraph or heading has the same id in the same page of every language. Each pair is a line
{"document": PAGE, "source": TEXT, "target": TEXT}.
"""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}


class Blocks(HTMLParser):
    """Collects the text of every paragraph and heading that has an id."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.texts = {}
        self.current = None

    def handle_starttag(self, tag, attrs):
        """A block begins."""
        if tag in BLOCKS:
            self.current = dict(attrs).get("id")
            if self.current in self.texts:
                self.current = None  # of a page embedded twice the first counts

    def handle_endtag(self, tag):
        """A block ends."""
        if tag in BLOCKS:
            self.current = None

    def handle_data(self, data):
        """Text, of a block or not."""
        if self.current is not None:
            self.texts[self.current] = self.texts.get(self.current, "") + data


def blocks_of(file):
    """Text by id of a page, white space collapsed."""
    parser = Blocks()
    parser.feed(file.read_text("utf-8"))
    return {name: " ".join(text.split()) for name, text in parser.texts.items()}


def pairs_of(root, source, target):
    """Yields the pairs of all pages that both languages have, by page and id."""
    for file in sorted((root / source / "text").rglob("*.html")):
        page = file.relative_to(root / source).as_posix()
        other = root / target / page
        if not other.exists():
            continue
        ours, theirs = blocks_of(file), blocks_of(other)
        for name in ours:
            if name in theirs:
                yield {"document": page, "source": ours[name], "target": theirs[name]}


def main(root, source, target):
    """Prints them."""
    for pair in pairs_of(Path(root), source, target):
        print(json.dumps(pair, ensure_ascii=False))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
