"""Files of other kinds than their names say: pickles, archives, tables of another program."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path

from tests.faults.corpus import Ran, Reads, Refused, add


def _zip(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


NOT_READ = Refused("UserError", "they can run code|pickle or a zip archive")
for protocol in (2, 3, 4, 5):
    add(
        f"a pickle of protocol {protocol} named jsonl",
        lambda f, p=protocol: _pickled(f, "p.jsonl", p),
        NOT_READ,
    )
add(
    "a pickle of protocol 0 named jsonl",
    lambda f: _pickled(f, "p.jsonl", 0),
    Refused("TooManyBadRows|DataError", "bad-json|NUL"),
)
add("a pickle in gz", lambda f: _pickled(f, "p.jsonl.gz", 4), NOT_READ)
add("a pickle named parquet", lambda f: _pickled(f, "p.parquet", 4), NOT_READ)
add("a pickle named arrow", lambda f: _pickled(f, "p.arrow", 4), NOT_READ)
add(
    "a pickle of protocol 0 named arrow",
    lambda f: _pickled(f, "p.arrow", 0),
    Refused("DataError", "not a readable Arrow"),
)
for suffix in (".pkl", ".pt", ".bin", ".npy", ".ckpt", ".joblib"):
    add(f"a pickle named {suffix}", lambda f, s=suffix: _pickled(f, f"p{s}", 4), NOT_READ)
add("a tensor archive named jsonl", _zip("archive/data.pkl", b"cos\nmkdir\n"), NOT_READ)
add("a zip that would leave its folder", _zip("../../../tmp/x", b"x"), NOT_READ)
add("csv", b"text\n\"=cmd|' /C calc'!A1\"\n", Reads(1), ".csv")  # a text, whatever it looks like
add("a spreadsheet", b"text\n", Refused("UserError", r"\.xlsx is not a kind"), ".xlsx")
add(
    "an object array of numpy named jsonl",
    b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}\n",
    Refused("TooManyBadRows|DataError", "not-utf8"),
)


def _pickled(folder: Path, name: str, protocol: int) -> Path:
    data = pickle.dumps(Ran(folder), protocol)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name
