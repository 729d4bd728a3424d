"""Compressed files as streams of bytes; one that is damaged ends early and says so."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Any, BinaryIO

from lmjax.errors import UserError

_CHUNK = 1 << 16  # of compressed bytes: where one of these is damaged, what it held is lost
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


class Unpacked:
    """A file's bytes, decompressed if its first bytes say that it is compressed.

    Attributes:
      broken: "" while all is well; where the compressed bytes are damaged or end too early, why:
        what could be read up to there has been given, and then the stream ends.
      offset: how many bytes were given so far.
      form: "gzip", "zstd", "bzip2", "xz" or "".
    """

    def __init__(self, raw: BinaryIO) -> None:
        self.broken, self.offset = "", 0
        self._raw = raw
        head = raw.read(6)
        self.form = next((form for magic, form in _MAGIC.items() if head.startswith(magic)), "")
        self._ready = bytearray() if self.form else bytearray(head)
        self._packed = head if self.form else b""
        self._engine: Any = self._new() if self.form else None

    def read(self, size: int = -1, /) -> bytes:
        """At most so many bytes, or all that is left; b"" at the end or where the file breaks."""
        if not self.form and not self._ready:
            data = self._raw.read(size)
        else:
            while (size < 0 or len(self._ready) < size) and self._more():
                pass
            data = bytes(self._ready if size < 0 else self._ready[:size])
            del self._ready[: len(data)]
        self.offset += len(data)
        return data

    def _more(self) -> bool:
        """Decompresses some more; False at the end."""
        if not self.form:
            data = self._raw.read(_CHUNK)
            self._ready += data
            return bool(data)
        if self.broken:
            return False
        packed = self._packed or self._raw.read(_CHUNK)
        self._packed = b""
        if not packed:
            if self._engine is not None:
                self.broken = f"{self.form} ends too early"
            return False
        try:
            if self._engine is None:
                if not packed.strip(b"\0"):  # padding after the last member
                    return True
                self._engine = self._new()
            self._ready += self._engine.decompress(packed)
            if self._engine.eof:
                self._packed, self._engine = self._engine.unused_data, None
        except (zlib.error, OSError, ValueError, lzma.LZMAError, _zstd_error()) as error:
            self.broken = f"{self.form} is damaged: {error}"
            return False
        return True

    def _new(self) -> Any:
        if self.form == "gzip":
            return zlib.decompressobj(31)
        if self.form == "bzip2":
            return bz2.BZ2Decompressor()
        if self.form == "xz":
            return lzma.LZMADecompressor()
        return _zstandard().ZstdDecompressor().decompressobj()


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("zstd files need `pip install 'lmjax[prepare]'`: no zstandard.") from error
    return zstandard


def _zstd_error() -> type[Exception]:
    try:
        return _zstandard().ZstdError
    except UserError:
        return zlib.error
