"""Hostile text: jsonl, JSON arrays, and both packed as gz or zst."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
from pathlib import Path

import zstandard

from tests.faults.corpus import GOOD, LINE, NO_ROWS, Reads, Refused, add, bad, between, chat, row

# ---- jsonl: bytes

DAMAGED = Refused("DataError", "damaged")
add("empty", b"", NO_ROWS)
add("blank lines alone", b"\n \r\n\t\n", NO_ROWS)
add("byte order mark", b"\xef\xbb\xbf" + LINE, Reads(1))
add("two byte order marks", b"\xef\xbb\xbf\xef\xbb\xbf" + LINE + LINE, Reads(1, ((1, "bad-json"),)))
add("byte order mark in the middle", between(b"\xef\xbb\xbf" + GOOD), bad("bad-json"))
add("UTF-16 with a mark", LINE.decode().encode("utf-16"), Refused("DataError", "UTF-16"))
add(
    "UTF-16 without a mark",
    LINE.decode().encode("utf-16-le"),
    Refused("TooManyBadRows|DataError", "NUL"),
)
add("UTF-32", LINE.decode().encode("utf-32"), Refused("DataError", "UTF-16"))
add("Latin-1", between('{"text": "é"}'.encode("latin-1")), bad("not-utf8"))
add("overlong UTF-8", between(b'{"text": "\xc0\xaf"}'), bad("not-utf8"))
add("CRLF", LINE.replace(b"\n", b"\r\n") * 3, Reads(3))
add("CR alone", GOOD + b"\r" + GOOD + b"\n" + LINE, Reads(1, ((1, "bad-json"),)))
add("zero page at the end", LINE * 2 + b"\0" * 4096, Reads(2, ((3, "nul"),)))
add("NUL in a text", between(b'{"text": "a\0b"}'), bad("nul"))
add("NUL by escape", between(b'{"text": "a\\u0000b"}'), bad("nul"))
add("half a surrogate by escape", between(b'{"text": "\\ud83d"}'), bad("surrogate"))
add("half a surrogate in a key", between(b'{"text": "x", "\\udc00": 1}'), bad("surrogate"))
add("half a surrogate in bytes", between(b'{"text": "\xed\xa0\x80"}'), bad("not-utf8"))
add("U+2028 and U+0085 in a text", '{"text": "a\u2028b\u0085c"}\n'.encode(), Reads(1))
add("no newline at the end", LINE + GOOD, Reads(2))
add("last line cut", LINE + GOOD[:9], Reads(1, ((2, "bad-json"),)))


def _sparse(folder: Path) -> Path:
    path = folder / "p.jsonl"
    with open(path, "wb") as file:
        file.write(LINE + b'{"text": "')
        file.seek(100 << 20, os.SEEK_CUR)  # a hole: 100 MB of a line that take no disk
        file.write(b'"}\n' + LINE)
    return path


add("a line of 100 MB", _sparse, bad("too-long"))

# ---- jsonl: JSON

for name, line, code in [
    ("Python dict", b"{'text': 'x'}", "bad-json"),
    ("trailing comma", b'{"text": "x",}', "bad-json"),
    ("comment", b'{"text": "x"} // why not', "bad-json"),
    ("two objects on a line", GOOD + GOOD, "bad-json"),
    ("a list", b"[1, 2]", "not-object"),
    ("a number", b"3", "not-object"),
    ("null", b"null", "not-object"),
    ("a text", b'"=cmd()"', "not-object"),
    ("NaN", b'{"text": "x", "w": NaN}', "nan"),
    ("minus Infinity", b'{"text": "x", "w": [-Infinity]}', "nan"),
    ("5,000 digits", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "bad-json"),
    ("a key twice", b'{"text": "x", "text": "y"}', "duplicate-key"),
    ("a key twice, deep", b'{"text": "x", "a": [{"b": 1, "b": 2}]}', "duplicate-key"),
    ("10^5 lists", b"[" * 100_000 + b"]" * 100_000, "too-deep"),
    ("10^5 objects", b'{"text":' * 100_000 + b"1" + b"}" * 100_000, "too-deep"),
    ("10^5 lists never closed", b'{"text": ' + b"[" * 100_000, "too-deep"),
    ("101 levels", b'{"text": "x", "a": ' + b"[" * 101 + b"]" * 101 + b"}", "too-deep"),
    ("the text is an object", b'{"text": {"$ref": "file:///etc/passwd"}}', "wrong-type"),
    ("the text is blank", b'{"text": " \\n"}', "no-answer"),
    ("no known field", b'{"question": "x"}', "missing-field"),
]:
    add(name, between(line), bad(code))
for name, line in [
    ("1e999", b'{"text": "x", "w": 1e999}'),
    ("brackets in a text", b'{"text": "' + b"[{" * 50_000 + b'"}'),
    (
        "keys that mean something to a language",
        row(__proto__={"a": 1}, __class__="os.system", constructor="x"),
    ),
    (
        "Jinja and shell in a text",
        row(more="{{ ''.__class__.__mro__ }} $(touch x) `touch x` %s %n ${jndi:ldap://x}"),
    ),
    ("terminal escapes in a text", row(more="\x1b]0;x\x07\x1b[2J\x08")),
    ("HTML in a text", row(more="</script><script>alert(1)</script><img src=x onerror=alert(1)>")),
]:
    add(name, between(line), Reads(3))
ODD_IDS = (
    "../../etc/passwd",
    "/abs",
    "a\nb",
    "=cmd|' /C calc'!A1",
    "+1+1",
    "@SUM(A1)",
    "-2",
    "con",
    "\u202egnp.exe",
    "\ufeff",
    "x" * 9999,
)
add(
    "ids that are paths, formulas and odd names",
    b"\n".join(row(id=id) for id in ODD_IDS),
    Reads(len(ODD_IDS), ids=ODD_IDS),
)
add("an id that is an object", between(row(id={"$oid": "1"})), Reads(3))
add("an id that is a huge number", row(id=10**400), Reads(1, ids=("1" + "0" * 400,)))
add(
    "one id a hundred times",
    LINE.replace(b"{", b'{"id": "a", ') * 100,
    Reads(100, ids=("a", *(f"a#{i}" for i in range(2, 101)))),
)

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OK = chat(ASK, SAY)
for name, line, code in [
    ("an unknown role", chat({"role": "root", "content": "x"}, SAY), "unknown-role"),
    ("a role that is a number", chat({"role": 1, "content": "x"}, SAY), "wrong-type"),
    ("a turn that is a text", chat("user: x", SAY), "wrong-type"),
    ("turns that are an object", b'{"messages": {"role": "user"}}', "wrong-type"),
    ("a content that is null", chat({"role": "user", "content": None}, SAY), "missing-field"),
    (
        "an image",
        chat(
            {"role": "user", "content": [{"type": "image_url", "url": "file:///etc/passwd"}]}, SAY
        ),
        "not-text",
    ),
    ("nobody answers", chat(ASK), "no-answer"),
    ("no turns", chat(), "no-answer"),
    ("tools that are deep JSON in a text", chat(ASK, SAY, tools="[" * 100_000), "wrong-type"),
]:
    add(name, OK + b"\n" + line + b"\n" + OK + b"\n", bad(code))
CALL = json.dumps(
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "[" * 100_000},
        ]
    }
).encode()
add("a function call that is deep JSON in a text", CALL, Reads(1))

# ---- JSON arrays

TWO = b"[" + GOOD + b",\n" + GOOD
for name, text, found in [
    ("array", TWO + b"]", Reads(2)),
    ("array never closed", TWO, Reads(2, ((3, "cut-file"),))),
    ("array cut in a row", TWO + b', {"text": "x', Reads(2, ((3, "cut-file"),))),
    ("array without commas", b"[" + GOOD + GOOD + b"]", Reads(2)),
    ("array of commas", b"[,,,]", NO_ROWS),
    ("a lone bracket", b"[", Refused("DataError", "never closed")),
    ("array and more", TWO + b"]" + GOOD, Reads(2, ((3, "bad-json"),))),
    (
        "array with a deep row",
        TWO + b", " + b"[" * 100_000 + b"]" * 100_000 + b"]",
        Reads(2, ((3, "too-deep"),)),
    ),
    (
        "array with brackets that do not match",
        TWO + b', {"text": ["x"}, 5]]',
        Reads(2, ((3, "bad-json"),)),
    ),
    (
        "array of 200,000 numbers",
        b"[" + b"1," * 200_000 + b"1]",
        Refused("DataError", "is a JSON list of numbers"),
    ),
    (
        "array with an endless number",
        TWO + b", " + b"1" * 12_000_000 + b"]",
        Reads(2, ((3, "too-long"),)),
    ),
    (
        "array with quotes that never end",
        TWO + b', {"text": "' + b'\\"' * 400_000,
        Reads(2, ((3, "cut-file"),)),
    ),
    (
        "an object over lines",
        b'{\n "rows": []\n}',
        Refused("DataError", "one JSON object spread over lines"),
    ),
]:
    add(name, text, found, ".json")

# ---- gz and zst

MANY = LINE * 50_000


def _noise(count: int) -> bytes:
    """Rows that do not compress away."""
    rng = random.Random(0)
    return b"".join(b'{"text": "%x"}\n' % rng.getrandbits(400) for _ in range(count))


PACKED = gzip.compress(_noise(2000), mtime=0)
FRAME = zstandard.compress(_noise(2000))
# a frame that asks for a window of 2 TB, with one empty block
WINDOW = b"\x28\xb5\x2f\xfd" + bytes([0x00, 0xF8]) + b"\x01\x00\x00"
add("gz: members in a row", gzip.compress(LINE) + gzip.compress(LINE), Reads(2), ".jsonl.gz")
add(
    "gz: 50,000 empty members",
    gzip.compress(b"", mtime=0) * 50_000 + gzip.compress(LINE),
    Reads(1),
    ".jsonl.gz",
)
add("gz: padded with zeros", gzip.compress(LINE) + b"\0" * 100_000, Reads(1), ".jsonl.gz")
add(
    "gz: zeros first",
    b"\0" * 9 + gzip.compress(LINE),
    Refused("DataError", r"not a \.gz file"),
    ".jsonl.gz",
)
add(
    "gz: garbage behind",
    gzip.compress(LINE) + b"garbage" * 9,
    Reads(1, ((2, "cut-file"),)),
    ".jsonl.gz",
)
add("gz: header alone", PACKED[:10], Refused("DataError", "ends in the middle"), ".jsonl.gz")
add("gz: damaged from the start", PACKED[:12] + b"\xff" * 50, DAMAGED, ".jsonl.gz")
add(
    "gz: wrong checksum",
    PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:],
    Refused("DataError", "checksum"),
    ".jsonl.gz",
)
add("gz: wrong length", PACKED[:-4] + b"\1\0\0\0", Refused("DataError", "checksum"), ".jsonl.gz")
add("gz: in gz", gzip.compress(PACKED), Refused("DataError", "compressed twice"), ".jsonl.gz")
add(
    "gz: a parquet file in it",
    gzip.compress(b"PAR1" * 9),
    Refused("UserError", "compressed table"),
    ".parquet.gz",
)
add("gz: only its name", LINE, Refused("DataError", r"not a \.gz file"), ".jsonl.gz")
add("gz: a bomb", lambda f: _bomb(f, "gz"), Refused("ResourceError", "expands beyond"))
add("zst: a bomb", lambda f: _bomb(f, "zst"), Refused("ResourceError", "expands beyond"))
add(
    "zst: frames in a row",
    zstandard.compress(LINE) + zstandard.compress(LINE),
    Reads(2),
    ".jsonl.zst",
)
add("zst: magic alone", FRAME[:4], Refused("DataError", "ends in the middle"), ".jsonl.zst")
add("zst: garbage", FRAME[:4] + b"\xff" * 99, DAMAGED, ".jsonl.zst")
add(
    "zst: garbage behind",
    zstandard.compress(LINE) + b"garbage",
    Reads(1, ((2, "cut-file"),)),
    ".jsonl.zst",
)
add("zst: asks for terabytes", WINDOW, DAMAGED, ".jsonl.zst")
add("bz2", bz2.compress(MANY), Refused("UserError", r"\.bz2 is not a kind"), ".bz2")
add("bz2 named jsonl", bz2.compress(LINE), Refused("TooManyBadRows|DataError", "not-utf8"))


def _bomb(folder: Path, kind: str) -> Path:
    path = folder / f"p.jsonl.{kind}"
    zeros = b" " * (1 << 24)
    piece = (
        gzip.compress(zeros) if kind == "gz" else zstandard.ZstdCompressor(level=19).compress(zeros)
    )
    path.write_bytes(piece * 64)
    return path
