"""Texts without the secrets that may stand in them: commands to paste, URLs in messages."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

HIDDEN = "***"
_FLAG = re.compile(r"^(--?[\w-]*(?:token|password|secret|api-?key|auth))(=.*)?$", re.IGNORECASE)
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|github_pat|glpat|xox[abp])[_-][A-Za-z0-9_-]{12,}")
# What stands before the @ of a URL. A secret key may hold slashes; a port, which may not, is none.
_USER = re.compile(r"(?<=://)(?:[^/?#\s]+|[^/@:\s]*:(?!\d*/)[^@\s]+)(?=@)")
_QUERY = re.compile(r"(?<=[?&;])([^=&;#\s]+)=[^&;#\s]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
# of a Ray cluster: HOST:PORT, perhaps behind a password
_ADDRESS = re.compile(r"^(--address=)?([^@\s]+)(?=@)")


def redacted(text: str) -> str:
    """`text` with access tokens and, in its URLs, user, password and the values of parameters as
    ***: a signed URL is a key.
    """
    return _TOKEN.sub(HIDDEN, _URL.sub(_bare, text))


def _bare(found: re.Match[str]) -> str:
    return _QUERY.sub(rf"\1={HIDDEN}", _USER.sub(HIDDEN, found[0]))


def readable_command(command: str | Sequence[str]) -> str:
    """A command line to paste into a shell, with the program's bare name and without secrets."""
    words, before = [], ""
    for i, word in enumerate(shlex.split(command) if isinstance(command, str) else command):
        if i == 0:
            name = os.path.basename(word)
            words.append("gradsift" if name in ("gradsift", "__main__.py") else word)
            continue
        earlier, before = _FLAG.match(before), word
        if earlier is not None and earlier[2] is None:
            words.append(HIDDEN)
            before = ""
        elif (flag := _FLAG.match(word)) is not None:
            words.append(f"{flag[1]}={HIDDEN}" if flag[2] else word)
        elif words[-1] == "--address" or word.startswith("--address="):
            words.append(redacted(word if "://" in word else _ADDRESS.sub(rf"\1{HIDDEN}", word)))
        else:
            words.append(redacted(word))
    return shlex.join(words)
