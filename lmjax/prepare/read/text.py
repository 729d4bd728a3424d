"""Plain text: one record a file, or one a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmjax.prepare.files import File
from lmjax.prepare.read.decode import Undecodable, decode
from lmjax.prepare.read.sheet import Piece, Sheet, Stream
from lmjax.prepare.read.unpack import Unpacked

_CHUNK = 1 << 22
LONGEST_LINE = 1 << 30  # bytes

Adder = Callable[[Sheet, int, int, bytes], None]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A file is one record: its whole text."""

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads a file; a compressed one that is broken gives what can be read of it."""
        yield from read_whole(piece, sheet, add_text)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A line is one record, empty ones too: their numbers are those of an editor, less one."""

    def cut(self, file: File, *, target: int) -> Sequence[Piece]:
        """Parts of about `target` bytes, if the file is not compressed."""
        return cut_at_lines(file, target=target)

    def read(self, piece: Piece, sheet: Sheet) -> Iterator[None]:
        """Reads the lines that begin in a piece."""
        for number, offset, line in lines_of(piece, sheet):
            add_text(sheet, number, offset, line.removesuffix(b"\r"))
            yield


def add_text(sheet: Sheet, number: int, offset: int, data: bytes) -> None:
    """Adds bytes as they are decoded; in quarantine if they are no text."""
    try:
        text, how = decode(data)
    except Undecodable as error:
        sheet.bad(number, offset, str(error), data)
        return
    if how:
        sheet.counts[how] += 1
    sheet.add(number, text)


def read_whole(piece: Piece, sheet: Sheet, add: Adder) -> Iterator[None]:
    """Reads a file whose one record `add(sheet, number, offset, data)` makes of its bytes."""
    with piece.file.open() as raw:
        stream = Unpacked(raw)
        data = stream.read()
        if data or not stream.broken:
            add(sheet, 0, 0, data)
        if stream.broken:
            sheet.bad(1, stream.offset, f"the rest of the file is lost: {stream.broken}", b"")
    yield


def lines_of(piece: Piece, sheet: Sheet) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number in the file, offset in bytes, line without its end) of a piece's lines.

    The last line of a stream that broke off is quarantined, with what is known of it.
    """
    number = piece.first
    with piece.file.open() as raw:
        stream: Stream
        if piece.begin:
            raw.seek(piece.begin)
            stream = raw
        else:
            stream = Unpacked(raw)
        offset, rest, past_end = piece.begin, b"", False
        while not past_end and (chunk := stream.read(_CHUNK)):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if past_end := 0 <= piece.end <= offset:
                    break
                yield number, offset, line
                number, offset = number + 1, offset + len(line) + 1
            if len(rest) > LONGEST_LINE:
                sheet.bad(
                    number,
                    offset,
                    f"a line of over {LONGEST_LINE} bytes; the rest of the file is not read",
                    rest,
                )
                return
        broken = getattr(stream, "broken", "")
        if broken:
            sheet.bad(number, offset, f"the rest of the file is lost: {broken}", rest)
        elif rest and not past_end and not 0 <= piece.end <= offset:
            yield number, offset, rest


def cut_at_lines(file: File, *, target: int) -> Sequence[Piece]:
    """Cuts a file of lines into parts of about `target` bytes that begin where a line does.

    The whole file is read once, to number its lines; a compressed file is one part.
    """
    pieces: list[Piece] = []
    with file.open() as raw:
        stream = Unpacked(raw)
        begin = at = lines = first = 0
        while not stream.form and (chunk := stream.read(_CHUNK)):
            seen = 0
            while (wanted := begin + target - at) < len(chunk):
                cut = chunk.find(b"\n", max(wanted, seen)) + 1
                if not cut:
                    break
                lines += chunk.count(b"\n", seen, cut)
                pieces.append(Piece(file=file, begin=begin, end=at + cut, first=first))
                begin, first, seen = at + cut, lines, cut
            lines += chunk.count(b"\n", seen)
            at += len(chunk)
    if begin < file.size or not pieces:
        pieces.append(Piece(file=file, begin=begin, end=-1, first=first))
    return pieces
