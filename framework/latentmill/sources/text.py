"""Text files as people have them, read as lines of UTF-8: compressed or not, in whatever encoding their program wrote."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from latentmill.plugin import RowError
from latentmill.sources.files import SourceFile
from latentmill.text import first_line

HEAD = 1 << 20
"""Bytes from which a file's encoding is guessed. What comes behind them and contradicts is refused."""

READ_BYTES = 1 << 16

BOM = b"\xef\xbb\xbf"

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

STRANGERS = {
    b"PK\x03\x04": "a zip file or a spreadsheet: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "a spreadsheet of old: save it as CSV",
    b"BZh": "compressed with bzip2: unpack it, or use gzip or zstd",
    b"\xfd7zXZ\0": "compressed with xz: unpack it, or use gzip or zstd",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"%PDF-": "a PDF file",
}

MARKS = {  # the longer ones first: UTF-16's mark begins UTF-32's
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}

IMPROBABLE = re.compile(rb"[\x81\x8d\x8f\x90\x9d\xfe\xff]|[\x80-\xff]{4}")
"""What text in a western language does not hold in cp1252: bytes without a meaning, and runs of letters with accents."""


class TextFile:
    """How a file is to be read: its ``compression``, its ``encoding``, and whether only carriage returns end its lines.

    Goes by the contents, never by the name. An encoding that was not given and is no kind of Unicode is ``guessed``.
    """

    def __init__(self, path: SourceFile, encoding: str | None = None) -> None:
        """Raises ValueError, saying what the file is, if it is no text or its encoding can't be told."""
        self.path = path
        with path.open("rb") as file:
            magic = file.read(8)
        for first, what in STRANGERS.items():
            if magic.startswith(first):
                raise ValueError(f"{path} is {what}")
        self.compression = next((name for first, name in COMPRESSIONS.items() if magic.startswith(first)), None)
        with self._unpacked() as file:
            head = b"".join(iter_upto(lambda: self._pull(file), HEAD))
        self.guessed = False
        self.encoding = codecs.lookup(encoding).name if encoding else self._guess(head)
        returns = "\r".encode(self.encoding), "\n".encode(self.encoding)
        self.returns = returns[0] in head and returns[1] not in head
        self.plain = self.compression is None and self.encoding == "utf-8" and not self.returns
        """Whether the bytes are taken as they lie in the file, so that an offset is a place in it."""

    def open(self) -> BinaryIO:
        """The file in UTF-8, from its start. ``seek`` works if it is ``plain``."""
        if self.plain:
            return self.path.open("rb")
        return cast(BinaryIO, io.BufferedReader(_Decoded(self), 2 * READ_BYTES))

    def notices(self) -> Iterator[str]:
        if self.guessed:
            yield f"read as {self.encoding}, which is a guess: source.encoding=NAME names another"
        elif self.encoding.startswith("utf-") and self.encoding != "utf-8":
            yield f"read as {self.encoding}"

    def _guess(self, head: bytes) -> str:
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                return encoding
        zeros = [head[start::2].count(0) for start in (0, 1)]
        if len(head) > 1 and max(zeros) > len(head) / 5 and min(zeros) < len(head) / 50:
            return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
        head = head if len(head) < HEAD else head[: head.rfind(b"\n") + 1]
        if is_utf8(head) or _has_utf8(head.split(b"\n")):
            return "utf-8"  # a line of it that is not will be an error row
        if not IMPROBABLE.search(head):
            self.guessed = True
            return "cp1252"
        lines = [line for line in head.split(b"\n") if line.strip()]
        if sum(map(is_utf8, lines)) <= len(lines) / 2:
            names = "source.encoding=NAME, as cp1251, shift_jis or gb18030"
            raise ValueError(f"{self.path} is neither UTF-8 nor UTF-16: write its encoding, {names}")
        return "utf-8"

    def _unpacked(self) -> Any:
        if self.compression is None:
            return self.path.open("rb")
        packed = pa.OSFile(str(self.path)) if isinstance(self.path, Path) else pa.PythonFile(self.path.open("rb"))
        return pa.CompressedInputStream(packed, self.compression)

    def _pull(self, file: Any) -> bytes:
        try:
            return cast(bytes, file.read(READ_BYTES))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{self.path} can't be unpacked: {first_line(error)}") from error


class _Decoded(io.RawIOBase):
    """A file's text as UTF-8, with line feeds where only carriage returns end its lines."""

    def __init__(self, text: TextFile) -> None:
        self.text, self.file = text, text._unpacked()
        self.errors = "surrogatepass" if text.encoding.startswith("utf-") else "surrogateescape"
        self.decoder = codecs.getincrementaldecoder(text.encoding)(self.errors)
        self.rest, self.over = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest and not self.over:
            piece = self.text._pull(self.file)
            self.over = not piece
            self.rest = self._converted(piece)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()

    def _converted(self, piece: bytes) -> bytes:
        text = self.text
        if text.guessed and not piece.isascii() and (_has_utf8(piece.split(b"\n")[1:-1]) or IMPROBABLE.search(piece)):
            raise ValueError(
                f"{text.path} was taken for {text.encoding}, and further on it is not: write source.encoding="
            )
        if text.encoding != "utf-8":
            try:
                # What can't be decoded stays what is no UTF-8: its row alone will be an error.
                piece = self.decoder.decode(piece, final=self.over).encode("utf-8", self.errors)
            except UnicodeDecodeError:
                piece = b"\xff"  # half a character at the end
        return piece.replace(b"\r", b"\n") if text.returns else piece


class Lines:
    """Lines of an open file, one at a time or many, that can be put back; knows where it is."""

    def __init__(self, file: BinaryIO, offset: int = 0, number: int = 0) -> None:
        self.file, self.offset, self.number = file, offset, number
        """``offset`` counts bytes from the start of the file, ``number`` lines."""
        self._back: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.line, b"")

    def line(self) -> bytes:
        """The next line with its end; nothing at the end of the file."""
        line = self._back.pop() if self._back else self.file.readline()
        self.offset += len(line)
        self.number += bool(line)
        return line

    def chunk(self, size: int) -> bytes:
        """Whole lines, of ``size`` bytes or somewhat more."""
        chunk = b"".join(reversed(self._back)) + self.file.read(size)
        self._back.clear()
        if not chunk.endswith(b"\n"):
            chunk += self.file.readline()
        self.offset += len(chunk)
        self.number += chunk.count(b"\n") + (chunk[-1:] not in (b"\n", b""))
        return chunk

    def take(self, size: int) -> bytes:
        """Bytes, wherever lines end; nothing at the end of the file. ``number`` doesn't follow."""
        taken = b"".join(reversed(self._back)) or self.file.read(size)
        self._back.clear()
        self.offset += len(taken)
        return taken

    def unread(self, lines: Iterable[bytes]) -> None:
        """Put lines back, the last that were read, in their order."""
        lines = list(lines)
        self.offset -= sum(map(len, lines))
        self.number -= len(lines)
        self._back += reversed(lines)

    @property
    def pending(self) -> bool:
        """Whether lines that were put back are still to come."""
        return bool(self._back)


def iter_upto(pull: Any, size: int) -> Iterator[bytes]:
    """Pieces, until ``size`` bytes are there or no more come."""
    while size > 0 and (piece := pull()):
        yield piece[:size]
        size -= len(piece)


def _has_utf8(lines: Iterable[bytes]) -> bool:
    """Whether a line is UTF-8 and not ASCII: by chance, in another encoding, hardly one ever is."""
    return any(not line.isascii() and is_utf8(line) for line in lines)


def is_utf8(text: bytes) -> bool:
    """Whether all of it is."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def loose(text: bytes) -> str:
    """Text out of UTF-8; bytes that are none stay what they are, as half surrogate pairs."""
    return text.decode("utf-8", "surrogateescape")


def strict(text: bytes | str, name: str) -> str:
    """Text out of UTF-8, or of what ``loose`` made of it. Raises RowError."""
    if isinstance(text, str):
        if text.isascii():
            return text
        text = text.encode("utf-8", "surrogateescape")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"{name} is not UTF-8, at byte {error.start}") from error


def is_blank(line: str) -> bool:
    """Whether a line holds nothing but white space, of any kind that Unicode has, and byte order marks."""
    stripped = line.strip()
    return not stripped or (stripped[0] == "\ufeff" and not stripped.replace("\ufeff", " ").strip())


def count_lines(chunk: bytes) -> int:
    """Lines that are not blank."""
    text = loose(chunk)
    if "\ufeff" in text:
        text = text.replace("\ufeff", " ")
    return sum(map(bool, map(str.strip, text.split("\n"))))
