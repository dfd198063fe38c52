"""File containers: where the rows of one source lie, and how they come back as they were.

A container is `Text` (jsonl or a JSON array, plain, .gz or .zst: rows are byte ranges) or `Table` (parquet, an Arrow file, a saved
`datasets` folder, a hub dataset: rows are table rows). Compressed text and parquet are unpacked once into an unlinked temporary file, so
that every row can be read again without the rest. Text rows are read with pread, not through a memory map: a file that is cut while it is
in use gives an error here, and would kill the process there.
"""

from __future__ import annotations

import difflib
import errno
import json
import mmap
import os
import re
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import zstandard

from gradsift.errors import DataError, DiskFull, ResourceError, UserError

TEXTS = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst", ".zstd")
SUFFIXES = (*TEXTS, *PACKED, ".parquet", ".arrow")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
CHUNK = 1 << 22  # bytes read at a time
EXPANSION = 1000.0  # unpacked over packed bytes: gzip's own limit is 1032, text rarely passes 20
EXPANSION_FROM = 1 << 30  # bytes; smaller files may expand as they like
_SAVE_AS = "Save the rows as jsonl or parquet."
_AGAIN = "Copy or download the file again."
_ROOM = "Set TMPDIR to a roomier disk."


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row was found. line: 1-based line of a jsonl file, else 1-based number of the row. [start, end): bytes, or a table row.

    fault: (code, text) when no row can be read there.
    """

    line: int
    start: int
    end: int
    data: Any = None  # bytes of a Text row, record of a Table row
    fault: tuple[str, str] | None = None


def open_source(name: str, *, max_row_bytes: int, max_expansion: float) -> Text | Table:
    """The container behind a path or `hf:NAME[:CONFIG][@REVISION]`.

    Raises UserError (missing, a pickle, an unknown kind), DataError (damaged), ResourceError (disk full, expands beyond the limit).
    """
    if name.startswith("hf:"):
        return _hub(name)
    path = Path(name)
    kinds = [suffix.lower() for suffix in path.suffixes]
    if any(kind in PICKLES for kind in kinds[-1:] + [kind for kind in kinds[-2:-1] if kinds[-1] in PACKED]):
        raise UserError("pickles and tensor files are not read: they can run code when loaded", where=name, remedy=_SAVE_AS)
    if path.is_dir():
        return _saved_folder(path)
    if path.exists() and not path.is_file():
        raise UserError("is a pipe or a device, and rows are read more than once", where=name, remedy="Write it to a file first.")
    try:
        with open(path, "rb") as file:
            return _open_file(file, path, name, max_row_bytes, max_expansion)
    except FileNotFoundError:
        raise UserError("there is no such file", where=name, remedy=_nearest(path)) from None
    except OSError as error:
        raise ResourceError(f"cannot be read: {error.strerror}", where=name, remedy="Check the path and its permissions.") from error


def _open_file(file: IO[bytes], path: Path, name: str, max_row_bytes: int, max_expansion: float) -> Text | Table:
    head = file.read(8)
    file.seek(0)
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise UserError("is a pickle or a zip archive, whatever its name says; not read", where=name, remedy=_SAVE_AS)
    if head[:4] == b"PAR1":
        return _parquet(file, name)
    if head[:6] == b"ARROW1" or path.suffix.lower() == ".arrow":
        return _arrow([path], name)
    packed = {b"\x1f\x8b": "gz", b"\x28\xb5": "zst"}.get(head[:2])
    if packed:
        return _unpack(file, packed, name, max_row_bytes, max_expansion)
    if path.suffix.lower() in PACKED and head:
        raise DataError(f"is not a {path.suffix} file, whatever its name says", where=name, remedy=_AGAIN)
    if path.suffix.lower() not in (*TEXTS, *PACKED, "") and head.lstrip(b"\xef\xbb\xbf" + _BLANK)[:1] not in (b"{", b"["):
        known = ", ".join((*TEXTS, *PACKED, ".parquet", ".arrow"))
        raise UserError(f"{path.suffix} is not a kind of file gradsift reads", where=name, remedy=f"It reads {known}.")
    return Text(os.dup(file.fileno()), name, max_row_bytes)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=1, cutoff=0.4)
    return f"Did you mean {path.parent / near[0]}?" if near else f"Look into {path.parent}."


def _unpack(file: IO[bytes], kind: str, name: str, max_row_bytes: int, max_expansion: float) -> Text:
    with tempfile.TemporaryFile(prefix="gradsift-", buffering=0) as spool:
        try:
            cut = _copy_unpacked(file, spool.fileno(), kind, name, max_expansion)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskFull(f"no space left in {tempfile.gettempdir()} to unpack it", where=name, remedy=_ROOM) from error
        head = os.pread(spool.fileno(), 8, 0)
        if not head and cut:
            raise DataError(cut, where=name, remedy=_AGAIN)
        if head[:4] == b"PAR1" or head[:6] == b"ARROW1":
            raise UserError("is a compressed table; parquet and Arrow compress on their own", where=name, remedy="Unpack it first.")
        return Text(os.dup(spool.fileno()), name, max_row_bytes, cut)


def _copy_unpacked(file: IO[bytes], spool: int, kind: str, name: str, max_expansion: float) -> str | None:
    """Returns why the input ended early, None when it did not. Several members or frames in a row are one text."""
    read = written = 0
    decoder: Any = None
    # zstd has no bound on what one call may return, so it is fed little at a time; zlib returns at most 1032 times its input.
    step = CHUNK >> 4 if kind == "gz" else 1 << 12
    try:
        while chunk := file.read(step):
            read += len(chunk)
            while chunk:
                if decoder is None:
                    decoder = zlib.decompressobj(31) if kind == "gz" else zstandard.ZstdDecompressor().decompressobj()
                data, chunk = memoryview(decoder.decompress(chunk)), b""
                written += len(data)
                while data:
                    data = data[os.write(spool, data) :]
                if decoder.eof:
                    chunk, decoder = decoder.unused_data.lstrip(b"\0"), None  # tapes pad with zeros
            if written > EXPANSION_FROM and written > read * max_expansion:
                what = f"expands beyond {max_expansion:g} times its size ({written:,} bytes from {read:,})"
                raise ResourceError(what, where=name, remedy="Unpack it by hand, or raise max_expansion, if you trust it.")
    except (zlib.error, zstandard.ZstdError) as error:
        if "incorrect data check" in str(error) or "checksum" in str(error).lower():
            raise DataError(f"its checksum does not match ({error})", where=name, remedy=_AGAIN) from error
        return f"the compressed data is damaged ({error})"
    return None if decoder is None else "the file ends in the middle of its compressed data"


_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
_BLANK = b" \t\r\n"


class Text:
    """A jsonl file or a JSON array. `kind` is "lines" or "array"; `cut` says why the file ended early, if it did."""

    def __init__(self, fd: int, name: str, max_row_bytes: int, cut: str | None = None) -> None:
        self.name, self.max_row_bytes, self.cut, self._fd = name, max_row_bytes, cut, fd
        weakref.finalize(self, os.close, fd)
        status = os.fstat(self._fd)
        self.size, self._changed = status.st_size, status.st_mtime_ns
        head = os.pread(self._fd, 1 << 16, 0)
        self.begin = 3 if head.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark belongs to the file, not to its first row
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("is UTF-16", where=name, remedy="Convert it to UTF-8.")
        first = head[self.begin :].lstrip(_BLANK)
        self.kind = "array" if first[:1] == b"[" and not _rows_are_lists(first) else "lines"
        if first.split(b"\n")[0].strip(_BLANK) == b"{":
            raise DataError("is one JSON object spread over lines", where=name, remedy="Write one row a line, or a JSON list of rows.")
        self.first = self.last = self.begin  # of an array: start of its first element, end of its last; set by rows()
        self.blank = 0

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). Raises DataError when the file has changed since it was opened."""
        status = os.fstat(self._fd)
        data = os.pread(self._fd, end - start, start)
        if len(data) < end - start or (status.st_mtime_ns, status.st_size) != (self._changed, self.size):
            raise DataError("was changed while it was in use", where=self.name, remedy="Run again, and leave the file alone meanwhile.")
        return data

    def __len__(self) -> int:
        return self.size

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
            if skipped or len(carry) > self.max_row_bytes:  # a line without end must not fill the memory: only its length is kept
                skipped, carry = skipped + len(carry), b""
        if skipped:
            yield self._oversized(line, start, start + skipped)
        elif carry and (place := self._line(line, start, start + len(carry), carry)):
            if self.cut and not carry.rstrip(_BLANK).endswith(b"}"):
                place = Place(line, place.start, place.end, fault=("cut-file", f"the row is cut off: {self.cut}"))
            yield place

    def _line(self, line: int, start: int, end: int, data: bytes) -> Place | None:
        if not data or data.isspace():
            self.blank += 1
            return None
        return self._oversized(line, start, end) if len(data) > self.max_row_bytes else Place(line, start, end, data)

    def _oversized(self, line: int, start: int, end: int) -> Place:
        return Place(line, start, end, fault=("too-long", f"the row has {end - start:,} bytes, over the limit of {self.max_row_bytes:,}"))

    def _array(self) -> Iterator[Place]:
        """Elements of a JSON array: brackets are matched on the bytes, so one bad element costs itself only, unless it leaves one open."""
        with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as data:
            depth, number, start = 0, 0, 0
            gap = end = self.begin
            closed = False
            for match in _STRUCTURE.finditer(data, self.begin):
                token = data[match.start()]
                if token == 0x22:  # a string
                    continue
                depth += 1 if token in b"[{" else -1
                if token in b"[{" and depth == 2:
                    start = match.start()
                    self.first = start if self.first == self.begin else self.first
                    for place in self._between(data[gap:start], gap, number):
                        number += 1
                        yield place
                elif token in b"]}" and depth == 1:
                    number, gap = number + 1, match.end()
                    self.last = gap
                    row = data[start:gap] if gap - start <= self.max_row_bytes else None
                    yield Place(number, start, gap, row) if row is not None else self._oversized(number, start, gap)
                elif depth == 1:
                    gap = match.end()
                elif depth <= 0:
                    closed, end = True, match.end()
                    yield from self._between(data[gap : match.start()], gap, number)
                    break
            if not closed:
                self.cut = self.cut or "the array is never closed"
                start = start if depth > 1 else gap
                if data[start : self.size].strip(_BLANK + b","):
                    yield Place(number + 1, start, self.size, fault=("cut-file", f"the row is cut off: {self.cut}"))
            elif data[end : self.size].strip(_BLANK):
                yield Place(number + 1, end, self.size, fault=("bad-json", "there is more after the end of the array"))

    @staticmethod
    def _between(gap: bytes, at: int, number: int) -> Iterator[Place]:
        """What stands between two elements: one comma, or elements that are no objects."""
        for piece in gap.split(b","):
            if piece.strip(_BLANK):
                number += 1
                yield Place(number, at, at + len(piece), piece.strip(_BLANK))
            at += len(piece) + 1


def _rows_are_lists(head: bytes) -> bool:
    """Whether a text that starts with `[` is jsonl whose first row is a list: a whole JSON value on the first line, and more below."""
    line, _, rest = head.partition(b"\n")
    if not rest.strip(_BLANK):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class Table:
    """Record batches that lie in a memory-mapped file. `kind` is "parquet" or "arrow", which is also what subsets are written as."""

    def __init__(self, table: pa.Table, name: str, kind: str) -> None:
        self.table, self.name, self.kind = table, name, kind
        self.cut, self.blank = None, 0

    def __len__(self) -> int:
        return self.table.num_rows

    def read(self, start: int, end: int) -> Any:
        """The record of row `start`."""
        return self.table.slice(start, end - start).to_pylist()[0]

    def rows(self) -> Iterator[Place]:
        at = 0
        for batch in self.table.to_batches(max_chunksize=1000):
            try:
                records: list[Any] = batch.to_pylist()
            except UnicodeDecodeError:
                records = [self._record(batch, i) for i in range(batch.num_rows)]
            for record in records:
                fault = None if record is not None else ("not-utf8", "a text of the row is not UTF-8")
                yield Place(at + 1, at, at + 1, record, fault)
                at += 1

    @staticmethod
    def _record(batch: pa.RecordBatch, row: int) -> Any:
        try:
            return batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            return None


def _parquet(file: IO[bytes], name: str) -> Table:
    """Parquet is unpacked into an Arrow file: one row of it cannot be read without its whole row group."""
    try:
        source = pq.ParquetFile(file)
        with tempfile.NamedTemporaryFile(prefix="gradsift-", suffix=".arrow") as spool:
            with pa.ipc.new_stream(spool, source.schema_arrow) as writer:  # a stream, since dictionaries may differ between row groups
                for batch in source.iter_batches(batch_size=1 << 14):
                    writer.write_batch(batch)
            spool.flush()
            table = pa.ipc.open_stream(pa.memory_map(spool.name)).read_all()
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"no space left in {tempfile.gettempdir()} to unpack it", where=name, remedy=_ROOM) from error
        raise DataError(f"is not a readable parquet file ({_short(error)})", where=name, remedy=_AGAIN) from error
    return Table(table, name, "parquet")


def _arrow(paths: list[Path], name: str) -> Table:
    tables = []
    for path in paths:
        try:
            source = pa.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            tables.append(pa.ipc.open_file(source).read_all() if is_file else pa.ipc.open_stream(source).read_all())
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DataError(f"is not a readable Arrow file ({_short(error)})", where=path, remedy=_AGAIN) from error
    return Table(pa.concat_tables(tables), name, "arrow")


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:120]


def _saved_folder(path: Path) -> Table:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk` (its train split, or its only one)."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_bytes())["splits"]
        if "train" not in names and len(names) != 1:
            raise UserError(f"holds the splits {', '.join(names)}", where=path, remedy=f"Name one, such as {path / names[0]}.")
        path = path / ("train" if "train" in names else names[0])
    state = path / "state.json"
    if not state.is_file():
        raise UserError("is a folder, but not one that `datasets` saved", where=path, remedy="Name the files in it.")
    described = json.loads(state.read_bytes())
    if described.get("_indices_data_files"):
        raise UserError("holds a shuffled or filtered view", where=path, remedy="Call flatten_indices() before save_to_disk().")
    names = [Path(file["filename"]).name for file in described["_data_files"]]
    return _arrow([path / name for name in names], str(path))


def _hub(name: str) -> Table:
    """`hf:NAME[:CONFIG][@REVISION]` through the `datasets` library; NAME may be a local folder. The train split, or the only one."""
    rest, config, revision = name[3:], "", ""
    if not os.path.isdir(rest):
        rest, _, revision = rest.partition("@")
        rest, _, config = rest.partition(":")
    if os.path.isfile(os.path.join(rest, "state.json")) or os.path.isfile(os.path.join(rest, "dataset_dict.json")):
        return _saved_folder(Path(rest))
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError("hf: sources need the `datasets` library", where=name, remedy='Install it: pip install "gradsift[hub]"') from None
    # The 3.x line of datasets could run a script of the repository; later ones cannot and warn about the option.
    options: Any = {"trust_remote_code": False} if datasets.__version__.startswith("3.") else {}
    try:
        loaded: Any = datasets.load_dataset(rest, config or None, revision=revision or None, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        remedy = "Check the name, the network and HF_TOKEN; or download the files and name them."
        raise UserError(f"cannot be loaded ({_short(error)})", where=name, remedy=remedy) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            splits = ", ".join(loaded)
            raise UserError(f"holds the splits {splits} and no train", where=name, remedy="Download the split and name its file.")
        loaded = loaded["train" if "train" in loaded else next(iter(loaded))]
    return Table(loaded.data.table, name, "arrow")
