"""Tables as containers of rows: parquet, Arrow files, folders saved by `datasets`, hub datasets.

Parquet is unpacked once into an unlinked temporary Arrow file. Every batch is checked before a
value of it is read: Arrow takes offsets as the file states them, and a file may lie.

A record is what was written, not what the columns make of it: values of the JSON type are decoded
wherever they stand, and fields of tools and of their calls that Arrow added to make all structs of
a column equal are taken out again.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from gradsift.data.folders import is_saved, saved_files
from gradsift.data.formats import RowFault, parse_value
from gradsift.data.limits import AGAIN, EXPANSION, ROOM, expanded
from gradsift.data.records import Place
from gradsift.errors import DataError, DiskFull, OutOfMemory, UserError

# rows decoded at once; rows and bytes of a batch that is kept
_STEP, _BATCH_ROWS, _BATCH_BYTES = 256, 1 << 14, 1 << 26
# what a value without a Python value raises
_UNREADABLE = (ValueError, LookupError, ArithmeticError, TypeError, pa.ArrowException)
# where a null says that another row has the field
_CALLS = frozenset({"tool_calls", "function_call", "tools", "functions"})


class Table:
    """Record batches that lie in a memory-mapped file. `kind` is "parquet" or "arrow", which is
    also what subsets are written as.
    """

    def __init__(self, table: pa.Table, name: str, kind: str) -> None:
        self.table, self.name, self.kind = table, name, kind
        self.cut, self.blank = None, 0
        decoders = {field.name: _decoder(field) for field in table.schema}
        self._decoders = {name: decode for name, decode in decoders.items() if decode}
        if len(set(table.column_names)) < table.num_columns:
            twice = next(
                column for column in table.column_names if table.column_names.count(column) > 1
            )
            raise DataError(
                f"has two columns named {twice!r}", where=name, remedy="Rename or drop one of them."
            )

    def __len__(self) -> int:
        return self.table.num_rows

    def read(self, start: int, end: int) -> Any:
        """The record of row `start`."""
        return self._decoded(self.table.slice(start, end - start).to_pylist()[0])

    def rows(self) -> Iterator[Place]:
        at = 0
        for batch in self.table.to_batches(max_chunksize=1000):
            try:
                records: list[Any] = batch.to_pylist()
            except _UNREADABLE:
                records = [self._record(batch, i) for i in range(batch.num_rows)]
            for record in records:
                fault = record if isinstance(record, tuple) else None
                if self._decoders and not isinstance(record, tuple):
                    try:
                        self._decoded(record)
                    except RowFault as error:
                        fault = (error.code, error.text)
                yield Place(at + 1, at, at + 1, None if fault else record, fault)
                at += 1

    def _decoded(self, record: dict[str, Any]) -> dict[str, Any]:
        for name, decode in self._decoders.items():
            record[name] = decode(record[name])
        return record

    @staticmethod
    def _record(batch: pa.RecordBatch, row: int) -> dict[str, Any] | tuple[str, str]:
        try:
            return batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            return "not-utf8", "a text of the row is not UTF-8"
        except _UNREADABLE as error:
            return "wrong-type", f"a value of the row cannot be read ({_short(error)})"


def _decoder(field: pa.Field, called: bool = False) -> Callable[[Any], Any] | None:
    """From the Python value of a column or of a part of it to the value that was written; None
    where they are the same.

    Args:
        field: the column, or a field inside it.
        called: whether it stands inside tools or their calls, where nulls are no values.
    """
    called, kind = called or field.name in _CALLS, field.type
    if _is_json(field):
        return lambda text: parse_value(text) if isinstance(text, str) else text
    if pa.types.is_struct(kind):
        inner = {child.name: _decoder(child, called) for child in kind}
        decoders = {name: decode for name, decode in inner.items() if decode}
        return _struct_decoder(decoders, called) if decoders or called else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        decode = _decoder(kind.value_field, called)
        return _list_decoder(decode) if decode else None
    if pa.types.is_map(kind) and called:
        # which Python has as pairs
        decode = _decoder(kind.item_field, called) or (lambda value: value)
        return lambda pairs: None if pairs is None else {name: decode(v) for name, v in pairs}
    return None


def _is_json(field: pa.Field) -> bool:
    """Whether a field is of the JSON type, which old versions of Arrow know by its metadata
    alone.
    """
    if isinstance(field.type, pa.BaseExtensionType):
        return field.type.extension_name == "arrow.json"
    return (field.metadata or {}).get(b"ARROW:extension:name") == b"arrow.json"


def _list_decoder(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda items: None if items is None else [decode(item) for item in items]


def _struct_decoder(
    decoders: dict[str, Callable[[Any], Any]], called: bool
) -> Callable[[Any], Any]:
    def decoded(record: dict[str, Any] | None) -> dict[str, Any] | None:
        if record is None:
            return None
        found = {
            name: decoders[name](value) if name in decoders else value
            for name, value in record.items()
        }
        if called:
            return {name: value for name, value in found.items() if value is not None}
        return found

    return decoded


def parquet(file: IO[bytes], name: str, max_expansion: float) -> Table:
    """Parquet is unpacked into an Arrow file: one row of it cannot be read without its whole row
    group.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        source = pq.ParquetFile(file)
        with tempfile.NamedTemporaryFile(prefix="gradsift-", suffix=".arrow") as spool:
            with pa.ipc.new_stream(spool, source.schema_arrow) as writer:
                # a stream, since dictionaries may differ between row groups
                for batch in _joined(source.iter_batches(batch_size=_STEP)):
                    _check(batch)
                    writer.write_batch(batch)
                    expanded(spool.tell(), size, max_expansion, name)
            spool.flush()
            table = pa.ipc.open_stream(pa.memory_map(spool.name)).read_all()
    except MemoryError as error:
        raise _too_large(name) from error
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"no space left in {tempfile.gettempdir()} to unpack it", where=name, remedy=ROOM
            ) from error
        raise DataError(
            f"is not a readable parquet file ({_short(error)})", where=name, remedy=AGAIN
        ) from error
    return Table(table, name, "parquet")


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Small batches joined to larger ones: rows are decoded few at a time, since a word of
    megabytes may stand in each of them.
    """
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if (
            sum(map(len, waiting)) >= _BATCH_ROWS
            or sum(b.get_total_buffer_size() for b in waiting) >= _BATCH_BYTES
        ):
            yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
            waiting = []
    if waiting:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()


def arrow(paths: list[Path], name: str, max_expansion: float) -> Table:
    """Arrow files or streams, one after the other; memory-mapped, but for what is compressed in
    them.
    """
    tables = []
    for path in paths:
        try:
            source = pa.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader: Any = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches, held = [], 0
            for batch in (
                (reader.get_batch(i) for i in range(reader.num_record_batches))
                if is_file
                else reader
            ):
                _check(batch)
                batches.append(batch)
                held += batch.get_total_buffer_size()
                expanded(held, source.size(), max_expansion, name)
            tables.append(pa.Table.from_batches(batches, reader.schema))
        except MemoryError as error:
            raise _too_large(path) from error
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DataError(
                f"is not a readable Arrow file ({_short(error)})", where=path, remedy=AGAIN
            ) from error
    if not tables or not all(table.schema.equals(tables[0].schema) for table in tables):
        what = "its files have different schemas" if tables else "holds no files"
        raise DataError(what, where=name, remedy="Save the data set again.")
    return Table(pa.concat_tables(tables), name, "arrow")


def _check(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid for offsets and indices that lead outside their buffers. Whether texts
    are UTF-8 is asked row by row.
    """
    for column in batch.columns:
        plain = _without_texts(column.type)
        (column if plain == column.type else column.view(plain)).validate(full=True)


def _without_texts(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of texts."""
    if isinstance(kind, pa.BaseExtensionType):
        return _without_texts(kind.storage_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_field.with_type(_without_texts(kind.value_type))
        return pa.list_(inner) if pa.types.is_list(kind) else pa.large_list(inner)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_texts(field.type)) for field in kind])
    return kind


def _too_large(name: str | Path) -> OutOfMemory:
    return OutOfMemory(
        "its rows do not fit into memory when they are unpacked",
        where=name,
        remedy="Save it again in smaller batches.",
    )


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:120]


def saved_folder(path: Path, split: str = "") -> Table:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk` (its train split, or
    its only one, where none is named).
    """
    folder, files = saved_files(path, split)
    return arrow(files, str(folder), EXPANSION)


def hub(name: str) -> Table:
    """`hf:NAME[:CONFIG][@REVISION]`, maybe with a split in brackets, through the `datasets`
    library; NAME may be a local folder. Without a split the train split, or the only one.
    """
    rest, config, revision, split = name[3:], "", "", ""
    # a slice such as train[:10%] has brackets of its own
    match = re.fullmatch(r"(.+?)\[([^\[]+(?:\[[^\[]*\])?)\]", rest)
    if match and not os.path.isdir(rest):
        rest, split = match.groups()
    local = os.path.isdir(rest)
    if not local:
        rest, _, revision = rest.partition("@")
        rest, _, config = rest.partition(":")
    if local and is_saved(Path(rest)):
        return saved_folder(Path(rest), split)
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError(
            "hf: sources need the `datasets` library",
            where=name,
            remedy='Install it: pip install "gradsift[hub]"',
        ) from None
    # The 3.x line of datasets could run a script of the repository; later ones cannot and warn
    # about the option.
    options: Any = {"trust_remote_code": False} if datasets.__version__.startswith("3.") else {}
    try:
        loaded: Any = datasets.load_dataset(
            rest, config or None, revision=revision or None, split=split or None, **options
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        remedy = "Check the name, the network and HF_TOKEN; or download the files and name them."
        if split and "split" in str(error).lower():
            remedy = "Correct the name in brackets."
        elif local:
            remedy = "Name its files instead, or a pattern such as 'FOLDER/*.parquet'."
        raise UserError(f"cannot be loaded ({_short(error)})", where=name, remedy=remedy) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise UserError(
                f"holds the splits {', '.join(loaded)} and no train",
                where=name,
                remedy=f"Name one in brackets: '{name}[{next(iter(loaded))}]'.",
            )
        loaded = loaded["train" if "train" in loaded else next(iter(loaded))]
    return Table(loaded.data.table, name, "arrow")
