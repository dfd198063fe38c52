"""File containers: where the rows of one source lie, and how they come back as they were.

A container is `Text` (jsonl, a JSON array or csv, plain, .gz or .zst: rows are byte ranges) or
`tables.Table` (parquet, an Arrow file, a saved `datasets` folder, a hub dataset: rows are table
rows). Compressed text is unpacked once into an unlinked temporary file, so that every row can be
read again without the rest. Text rows are read with pread, not through a memory map: a file that is
cut while it is in use gives an error here, and would kill the process there.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import json
import mmap
import os
import re
import tempfile
import weakref
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import zstandard

from gradsift.data.folders import saved_files
from gradsift.data.formats import RowFault, parse_row
from gradsift.data.limits import AGAIN, MAX_ROW_BYTES, ROOM, expanded
from gradsift.data.records import Place
from gradsift.data.remote import fetched, is_url
from gradsift.errors import DataError, DiskFull, ResourceError, UserError
from gradsift.redaction import redacted

if TYPE_CHECKING:
    from gradsift.data.tables import Table

CELLS = {".csv": ",", ".tsv": "\t"}
TEXTS = (".jsonl", ".ndjson", ".json", *CELLS)
PACKED = (".gz", ".zst", ".zstd")
SUFFIXES = (*TEXTS, *PACKED, ".parquet", ".arrow")
# kind of a container -> suffix
KINDS = {
    "lines": ".jsonl",
    "array": ".json",
    "csv": ".csv",
    "tsv": ".tsv",
    "parquet": ".parquet",
    "arrow": ".arrow",
}
# What rows of a kind can be written as. JSON has values that no column and no cell has.
_BECOMES = {
    **dict.fromkeys(("lines", "array"), ("lines", "array")),
    "csv": ("lines", "array", "csv"),
    "tsv": ("lines", "array", "tsv"),
    **dict.fromkeys(("parquet", "arrow"), ("lines", "array", "parquet", "arrow")),
}
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
CHUNK = 1 << 22  # bytes read at a time
_SAVE_AS = "Save the rows as jsonl or parquet."


class _Kind(NamedTuple):
    """What a path turned out to be: `of` is folder, parquet, arrow, gz, zst or text. `file`: it,
    open; `name`: for messages.
    """

    of: str
    path: Path
    name: str
    file: IO[bytes] | None


def open_source(name: str, *, max_row_bytes: int, max_expansion: float) -> Text | Table:
    """The container behind a path, a URL that fsspec knows, or `hf:NAME[:CONFIG][@REVISION][SPLIT]`
    (the split in brackets).

    Raises UserError (missing, a pickle, an unknown kind), DataError (damaged), ResourceError (disk
    full, expands beyond the limit).
    """
    if _is_hub(name):
        from gradsift.data.tables import hub

        return hub(name)
    with _looked_at(name) as kind:
        if kind.file is None or kind.of in ("parquet", "arrow"):
            from gradsift.data.tables import arrow, parquet, saved_folder

            if kind.file is None:
                return saved_folder(kind.path)
            return (
                parquet(kind.file, kind.name, max_expansion)
                if kind.of == "parquet"
                else arrow([kind.path], kind.name, max_expansion)
            )
        if kind.of == "text":
            return _text(os.dup(kind.file.fileno()), kind.name, max_row_bytes)
        return _unpack(kind.file, kind.of, kind.name, max_row_bytes, max_expansion)


def check_source(name: str) -> Text | None:
    """Raises what `open_source` raises before it unpacks or fetches anything: a look at the first
    bytes.

    Args:
        name: as `open_source` takes it. A URL or a hub dataset is not looked at.

    Returns:
        The text where the name is that of a plain one, to look at its rows; else None.
    """
    if _is_hub(name) or is_url(name):
        return None
    with _looked_at(name) as kind:
        if kind.file is None:
            saved_files(kind.path)
        return (
            _text(os.dup(kind.file.fileno()), kind.name, MAX_ROW_BYTES)
            if kind.file is not None and kind.of == "text"
            else None
        )


def _is_hub(name: str) -> bool:
    return name.startswith("hf:") and len(name) > 3


def container(path: str | Path) -> tuple[str, str]:
    """(kind, compression) that the suffixes of a path or URL name. Raises UserError."""
    named = Path(str(path).partition("?")[0] if is_url(str(path)) else path)
    packing = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}.get(named.suffix.lower(), "")
    inner = Path(named.stem).suffix.lower() if packing else named.suffix.lower()
    kind = ({ending: kind for kind, ending in KINDS.items()} | {".ndjson": "lines"}).get(inner)
    if kind is None or (packing and kind in ("parquet", "arrow")):
        raise UserError(
            "its suffix names no container",
            where=path,
            remedy=(
                "End the name in .jsonl, .json, .csv, .tsv (also with .gz or .zst), .parquet or"
                " .arrow."
            ),
        )
    return kind, packing


def converted(kinds: Collection[str], path: str | Path) -> str | None:
    """What is to be said when rows of these kinds are written to `path`: that they are converted;
    None where they stay as they are.

    Raises:
        UserError: its suffix names no container, or one that the rows cannot be written in.
    """
    kind, _ = container(path)
    for came in kinds:
        if kind not in _BECOMES[came]:
            known = ", ".join(KINDS[name] for name in _BECOMES[came])
            raise UserError(
                f"{KINDS[came]} rows are not turned into {KINDS[kind]}: types would change",
                where=path,
                remedy=f"End the name in one of {known}.",
            )
    others = sorted({KINDS[came] for came in kinds} - {KINDS[kind]})
    return f"rows are converted from {', '.join(others)} to {KINDS[kind]}" if others else None


@contextlib.contextmanager
def _looked_at(name: str) -> Iterator[_Kind]:
    """The kind of a file or folder, open meanwhile; what the system says of it, within too, as an
    error of ours.
    """
    if name in ("", "hf:") or "\0" in name:
        raise UserError(
            "names nothing that could be read",
            where=name.replace("\0", "?"),
            remedy="Name a file, or hf:NAME.",
        )
    path = fetched(name) if is_url(name) else Path(name)
    kinds = [suffix.lower() for suffix in path.suffixes]
    if any(
        kind in PICKLES
        for kind in kinds[-1:] + [kind for kind in kinds[-2:-1] if kinds[-1] in PACKED]
    ):
        raise UserError(
            "pickles and tensor files are not read: they can run code when loaded",
            where=name,
            remedy=_SAVE_AS,
        )
    try:
        if path.is_dir():
            yield _Kind("folder", path, name, None)
            return
        if path.exists() and not path.is_file():
            raise UserError(
                "is a pipe or a device, and rows are read more than once",
                where=name,
                remedy="Write it to a file first.",
            )
        with open(path, "rb") as file:
            shown = redacted(name) if is_url(name) else name
            yield _Kind(_kind(file, path, shown), path, shown, file)
    except FileNotFoundError:
        raise UserError("there is no such file", where=name, remedy=_nearest(path)) from None
    except OSError as error:
        raise ResourceError(
            f"cannot be read: {error.strerror}",
            where=name,
            remedy="Check the path and its permissions.",
        ) from error


def _kind(file: IO[bytes], path: Path, name: str) -> str:
    """Of a file by its first bytes and, where they leave it open, its name. Raises UserError,
    DataError.
    """
    head = file.read(8)
    file.seek(0)
    _refuse_pickle(head, name)
    if head[:4] == b"PAR1" or path.suffix.lower() == ".parquet":
        return "parquet"
    if head[:6] == b"ARROW1" or path.suffix.lower() == ".arrow":
        return "arrow"
    packed = _packing(head)
    if packed:
        return packed
    if path.suffix.lower() in PACKED and head:
        raise DataError(
            f"is not a {path.suffix} file, whatever its name says", where=name, remedy=AGAIN
        )
    if path.suffix.lower() not in (*TEXTS, *PACKED, "") and head.lstrip(b"\xef\xbb\xbf" + _BLANK)[
        :1
    ] not in (b"{", b"["):
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"{path.suffix} is not a kind of file gradsift reads",
            where=name,
            remedy=f"It reads {known}.",
        )
    return "text"


def _packing(head: bytes) -> str | None:
    return {b"\x1f\x8b": "gz", b"\x28\xb5": "zst"}.get(head[:2])


def _refuse_pickle(head: bytes, name: str) -> None:
    if head[:4] == b"PK\x03\x04" or (
        head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        raise UserError(
            "is a pickle or a zip archive, whatever its name says; not read",
            where=name,
            remedy=_SAVE_AS,
        )


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=1, cutoff=0.4)
    return f"Did you mean {path.parent / near[0]}?" if near else f"Look into {path.parent}."


def _unpack(
    file: IO[bytes], kind: str, name: str, max_row_bytes: int, max_expansion: float
) -> Text:
    with tempfile.TemporaryFile(prefix="gradsift-", buffering=0) as spool:
        try:
            cut = _copy_unpacked(file, spool.fileno(), kind, name, max_expansion)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskFull(
                f"no space left in {tempfile.gettempdir()} to unpack it", where=name, remedy=ROOM
            ) from error
        head = os.pread(spool.fileno(), 8, 0)
        if not head and cut:
            raise DataError(cut, where=name, remedy=AGAIN)
        _refuse_pickle(head, name)
        if _packing(head):
            raise DataError("is compressed twice", where=name, remedy="Unpack it once.")
        if head[:4] == b"PAR1" or head[:6] == b"ARROW1":
            raise UserError(
                "is a compressed table; parquet and Arrow compress on their own",
                where=name,
                remedy="Unpack it first.",
            )
        return _text(os.dup(spool.fileno()), name, max_row_bytes, cut)


def _copy_unpacked(
    file: IO[bytes], spool: int, kind: str, name: str, max_expansion: float
) -> str | None:
    """Returns why the input ended early, None when it did not. Several members or frames in a row
    are one text.
    """
    read = written = 0
    decoder: Any = None
    # What one call may return is bounded by what it is fed: 1032 times that with zlib, 32,768 times
    # with zstd. Little at a time also keeps a file of thousands of tiny members from being copied
    # once for each of them.
    step = 1 << 16 if kind == "gz" else 1 << 12
    try:
        while chunk := file.read(step):
            read += len(chunk)
            while chunk := chunk if decoder else chunk.lstrip(b"\0"):  # tapes pad with zeros
                if decoder is None:
                    decoder = (
                        zlib.decompressobj(31)
                        if kind == "gz"
                        else zstandard.ZstdDecompressor().decompressobj()
                    )
                data, chunk = memoryview(decoder.decompress(chunk)), b""
                written += len(data)
                while data:
                    data = data[os.write(spool, data) :]
                if decoder.eof:
                    chunk, decoder = decoder.unused_data, None
            expanded(written, read, max_expansion, name)
    except (zlib.error, zstandard.ZstdError) as error:
        if any(
            word in str(error).lower()
            for word in ("incorrect data check", "incorrect length check", "checksum")
        ):
            raise DataError(
                f"its checksum does not match ({error})", where=name, remedy=AGAIN
            ) from error
        return f"the compressed data is damaged ({error})"
    return None if decoder is None else "the file ends in the middle of its compressed data"


def _text(fd: int, name: str, max_row_bytes: int, cut: str | None = None) -> Text:
    """The text in an open file, which is csv by its name where its first byte does not say
    otherwise.
    """
    path = Path(name.partition("?")[0] if is_url(name) else name)
    inner = Path(path.stem) if path.suffix.lower() in PACKED else path
    delimiter = CELLS.get(inner.suffix.lower())
    head = os.pread(fd, 64, 0).lstrip(b"\xef\xbb\xbf" + _BLANK)
    if delimiter is None or head[:1] in (b"{", b"["):
        return Text(fd, name, max_row_bytes, cut)
    return Cells(fd, name, max_row_bytes, cut, delimiter)


_MARK, _SOLID, _MORE, _PIECE = (
    re.compile(rb) for rb in (rb'["{}\[\]]', rb"[^ \t\r\n]", rb"[^ \t\r\n,]", rb"[^,]+")
)
_BLANK = b" \t\r\n"


class Text:
    """A jsonl file or a JSON array. `kind` is "lines" or "array"; `cut` says why the file ended
    early, if it did.
    """

    def __init__(self, fd: int, name: str, max_row_bytes: int, cut: str | None = None) -> None:
        self.name, self.max_row_bytes, self.cut, self._fd = name, max_row_bytes, cut, fd
        weakref.finalize(self, os.close, fd)
        status = os.fstat(self._fd)
        self.size, self._changed = status.st_size, status.st_mtime_ns
        head = os.pread(self._fd, 1 << 16, 0)
        # a byte order mark belongs to the file, not to its first row
        self.begin = 3 if head.startswith(b"\xef\xbb\xbf") else 0
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("is UTF-16", where=name, remedy="Convert it to UTF-8.")
        first = head[self.begin :].lstrip(_BLANK)
        self.kind = "array" if first[:1] == b"[" and not _rows_are_lists(first) else "lines"
        if first.split(b"\n")[0].strip(_BLANK) == b"{":
            raise DataError(
                "is one JSON object spread over lines",
                where=name,
                remedy=_rows_in(first) or "Write one row a line, or a JSON list of rows.",
            )
        if self.kind == "array" and (items := _items(first)):
            raise DataError(
                f"is a JSON list of {items}, not of rows",
                where=name,
                remedy='Make each of them an object, such as {"text": "..."}.',
            )
        # of an array: start of its first element, end of its last; set by rows()
        self.first = self.last = self.begin
        self.blank = 0

    def parse(self, data: bytes) -> dict[str, Any]:
        """The record of a row's bytes. Raises RowFault."""
        return parse_row(data)

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). Raises DataError when the file has changed since it was opened."""
        status = os.fstat(self._fd)
        data = os.pread(self._fd, end - start, start)
        if len(data) < end - start or (status.st_mtime_ns, status.st_size) != (
            self._changed,
            self.size,
        ):
            raise DataError(
                "was changed while it was in use",
                where=self.name,
                remedy="Run again, and leave the file alone meanwhile.",
            )
        return data

    def __len__(self) -> int:
        return self.size

    def most_rows(self, enough: int) -> int:
        """The most rows that its lines can hold, or `enough` as soon as it may hold so many; of an
        array, which has no lines, always `enough`.
        """
        if self.kind == "array":
            return enough
        ends, at, last = 0, self.begin, b"\n"
        while ends < enough and (chunk := os.pread(self._fd, CHUNK, at)):
            ends, at, last = ends + chunk.count(b"\n"), at + len(chunk), chunk[-1:]
        return min(ends + (last != b"\n"), enough)

    def rows(self) -> Iterator[Place]:
        """Every row that is not blank, in file order; `blank` counts the others."""
        self.blank = 0
        yield from self._array() if self.kind == "array" else self._lines()

    def _lines(self) -> Iterator[Place]:
        line, start, carry, skipped, at = 1, self.begin, b"", 0, self.begin
        while chunk := os.pread(self._fd, CHUNK, at):
            at += len(chunk)
            parts = (carry + chunk).split(b"\n")
            carry = parts.pop()
            for part in parts:
                end = start + skipped + len(part)
                if skipped:
                    yield self._oversized(line, start, end)
                elif place := self._line(line, start, end, part):
                    yield place
                start, line, skipped = end + 1, line + 1, 0
            if skipped or len(carry) > self.max_row_bytes:
                # a line without end must not fill the memory: only its length is kept
                skipped, carry = skipped + len(carry), b""
        if skipped:
            yield self._oversized(line, start, start + skipped)
        elif carry and (place := self._line(line, start, start + len(carry), carry)):
            if self.cut and not carry.rstrip(_BLANK).endswith(b"}"):
                place = Place(
                    line,
                    place.start,
                    place.end,
                    fault=("cut-file", f"the row is cut off: {self.cut}"),
                )
            yield place

    def _line(self, line: int, start: int, end: int, data: bytes) -> Place | None:
        if not data or data.isspace():
            self.blank += 1
            return None
        return (
            self._oversized(line, start, end)
            if len(data) > self.max_row_bytes
            else Place(line, start, end, data)
        )

    def _oversized(self, line: int, start: int, end: int) -> Place:
        return Place(
            line,
            start,
            end,
            fault=(
                "too-long",
                f"the row has {end - start:,} bytes, over the limit of {self.max_row_bytes:,}",
            ),
        )

    def _array(self) -> Iterator[Place]:
        """Elements of a JSON array: brackets are matched on the bytes, so one bad element costs
        itself only, unless it leaves one open.
        """
        with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as data:
            depth, number, start = 0, 0, 0
            gap = end = self.begin
            closed = False
            for token, at in _brackets(data, self.begin):
                depth += 1 if token in b"[{" else -1
                if token in b"[{" and depth == 2:
                    start = at
                    self.first = start if self.first == self.begin else self.first
                    for place in self._between(data, gap, start, number):
                        number += 1
                        yield place
                elif token in b"]}" and depth == 1:
                    number, gap = number + 1, at + 1
                    self.last = gap
                    row = data[start:gap] if gap - start <= self.max_row_bytes else None
                    yield (
                        Place(number, start, gap, row)
                        if row is not None
                        else self._oversized(number, start, gap)
                    )
                elif depth == 1:
                    gap = at + 1
                elif depth <= 0:
                    closed, end = True, at + 1
                    yield from self._between(data, gap, at, number)
                    break
            if not closed:
                self.cut = self.cut or "the array is never closed"
                start = start if depth > 1 else gap
                if _MORE.search(data, start):
                    yield Place(
                        number + 1,
                        start,
                        self.size,
                        fault=("cut-file", f"the row is cut off: {self.cut}"),
                    )
            elif _SOLID.search(data, end):
                yield Place(
                    number + 1,
                    end,
                    self.size,
                    fault=("bad-json", "there is more after the end of the array"),
                )

    def _between(self, data: mmap.mmap, begin: int, end: int, number: int) -> Iterator[Place]:
        """What stands between two elements: one comma, or elements that are no objects."""
        for piece in _PIECE.finditer(data, begin, end):
            if _SOLID.search(data, piece.start(), piece.end()):
                number += 1
                if piece.end() - piece.start() > self.max_row_bytes:
                    yield self._oversized(number, piece.start(), piece.end())
                else:
                    yield Place(number, piece.start(), piece.end(), piece.group().strip(_BLANK))


class Cells(Text):
    """A csv or tsv file: its first line names the columns, and every cell is a text. `kind` is
    "csv" or "tsv"; `begin` to `first` is the line of names.
    """

    def __init__(
        self, fd: int, name: str, max_row_bytes: int, cut: str | None, delimiter: str
    ) -> None:
        super().__init__(fd, name, max_row_bytes, cut)
        self.kind = "tsv" if delimiter == "\t" else "csv"
        self.delimiter = delimiter
        csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
        self.columns: list[str] = []
        head = next(iter(self._records(self.begin)), None)
        if head is None:
            return
        _, self.first, cells = head
        if delimiter == "," and len(cells) == 1:
            # what a spreadsheet writes where the comma is the decimal point
            self.delimiter = next((d for d in (";", "\t") if d in cells[0]), ",")
            cells = next(iter(self._records(self.begin)))[2]
        self.columns = [cell.strip() for cell in cells]
        twice = {column for column in self.columns if self.columns.count(column) > 1}
        if twice:
            raise DataError(
                f"has two columns named {min(twice)!r}",
                where=name,
                remedy="Rename or drop one of them.",
            )

    def parse(self, data: bytes) -> dict[str, Any]:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowFault("not-utf8", f"byte {error.start + 1} of the row is not UTF-8") from None
        if "\0" in text:
            raise RowFault("nul", "the row holds NUL bytes")
        try:
            cells = next(csv.reader([text], delimiter=self.delimiter), [])
        except csv.Error as error:
            raise RowFault("bad-csv", f"the row cannot be split into cells ({error})") from None
        if len(cells) != len(self.columns):
            raise RowFault(
                "bad-csv", f"{len(cells)} cells below {len(self.columns)} names of columns"
            )
        return dict(zip(self.columns, cells, strict=True))

    def rows(self) -> Iterator[Place]:
        """Every row that is not blank, in file order; `blank` counts the others."""
        self.blank, line = 0, 1 + os.pread(self._fd, self.first, 0).count(b"\n")
        for start, end, cells in self._records(self.first):
            data = os.pread(self._fd, end - start, start)
            body = data.rstrip(b"\r\n")
            if not cells:
                self.blank += 1
            elif len(body) > self.max_row_bytes:
                yield self._oversized(line, start, start + len(body))
            elif end == len(self) and self._open(body):
                self.cut = f"the quote that opens in line {line} is never closed"
                yield Place(line, start, end, fault=("cut-file", self.cut))
            else:
                yield Place(line, start, start + len(body), body)
            line += data.count(b"\n")

    def _open(self, body: bytes) -> bool:
        """Whether a quote is still open at the end of the file's last row."""
        lines = iter([body.decode("utf-8", "surrogateescape").replace("\0", " "), ""])
        next(csv.reader(lines, delimiter=self.delimiter), None)
        # a reader asks for another line only inside of quotes
        return next(lines, None) is None

    def _records(self, at: int) -> Iterator[tuple[int, int, list[str]]]:
        """(begin, end, cells) of every record from byte `at` on. A cell in quotes may hold new
        lines.
        """
        start = end = at

        def texts() -> Iterator[str]:
            nonlocal end
            for line in self._physical(at):
                end += len(line)
                # both are told when the row is parsed
                yield line.decode("utf-8", "surrogateescape").replace("\0", " ")

        reader = csv.reader(texts(), delimiter=self.delimiter)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                # told when the row is parsed
                cells = [""]
            yield start, end, cells
            start = end

    def _physical(self, at: int) -> Iterator[bytes]:
        """The lines from byte `at` on, each with its end."""
        carry = b""
        while chunk := os.pread(self._fd, CHUNK, at):
            at += len(chunk)
            *lines, carry = (carry + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"
            if len(carry) > self.max_row_bytes:
                # too long for a row, and a line without end must not fill the memory
                yield carry
                carry = b""
        if carry:
            yield carry


def _rows_in(head: bytes) -> str | None:
    """Which list of a JSON object holds the rows, as a remedy."""
    match = re.search(rb'"([A-Za-z_][\w.-]{0,40})"\s*:\s*\[\s*\{', head)
    return f"Write the list below its key {match[1].decode()!r} alone." if match else None


def _items(head: bytes) -> str | None:
    """What the JSON list that a text begins with holds, where that is no object; None for one that
    holds an object, or nothing.
    """
    decoder, names = json.JSONDecoder(), {str: "strings", list: "lists", bool: "true and false"}
    text, at, found = head.decode("utf-8", "replace"), 1, None
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if text[at : at + 1] in ("", "{", "]"):
            return found if text[at : at + 1] != "{" else None
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            # the end of what was read of the file, or damage, which the rows tell
            return found if len(head) >= 1 << 15 else None
        found = found or names.get(type(item), "numbers" if item is not None else "nulls")


def _brackets(data: mmap.mmap, at: int) -> Iterator[tuple[int, int]]:
    """(byte, place) of every bracket outside texts. One expression for a whole text would try an
    endless one anew at each of its quotes.
    """
    while (mark := _MARK.search(data, at)) is not None:
        at = mark.end()
        if data[mark.start()] != 0x22:
            yield data[mark.start()], mark.start()
            continue
        while (at := data.find(b'"', at) + 1) > 0:
            slashes = at - 2
            while data[slashes] == 0x5C:
                slashes -= 1
            if (at - slashes) % 2 == 0:
                # an even number of backslashes before the quote: it ends the text
                break
        else:
            return


def _rows_are_lists(head: bytes) -> bool:
    """Whether a text that starts with `[` is jsonl whose first row is a list: a whole JSON value on
    the first line, and more below.
    """
    line, _, rest = head.partition(b"\n")
    if not rest.strip(_BLANK):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
