"""A run: one folder whose artifacts are found by what they are made of, held by one process at a
time, checked and mended file by file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.config import Config
from gradsift.errors import IntegrityError, MismatchError, ResourceError, UserError
from gradsift.redaction import readable_command
from gradsift.store.artifact import (
    MANIFEST,
    RECIPE,
    SCHEMA,
    Artifact,
    check_schema,
    recipe,
    rewritten,
)
from gradsift.store.atomic import (
    inside,
    make_folder,
    read_json,
    remove_leftovers,
    rename,
    resource_error,
    write_atomic,
)
from gradsift.store.canonical import canonical_json, seal_fault, sealed
from gradsift.store.verify import BY_NAME, Problem, check_folder, own_fault

RUN_FILE, SETTINGS, LOCK_FILE = "run.json", "settings.json", ".gradsift-lock"
# what a verification named; the folder where the next run puts those files
FOUND, ASIDE = "found-damaged.json", "damaged"
_KIND = "gradsift run"
# files of the run itself, and what they hold
_OWN = {RUN_FILE: ("kind", "schema", "commands"), SETTINGS: tuple(Config.model_fields)}


class Run:
    """The folder `root`. Opening one reads; the first `lock` or `artifact` makes what is not there.

    Raises UserError when `root` is a file, or a folder that is not empty and not a run;
    MismatchError for a run of a newer gradsift.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self._held = 0
        self.aside: list[Problem] = []  # what this process found damaged and moved away
        try:
            if self.root.exists() and not self.root.is_dir():
                raise UserError(
                    "is a file, not a run folder",
                    where=self.root,
                    remedy="Choose another --run folder.",
                )
            strangers = (
                sorted(p.name for p in self.root.iterdir() if not p.name.startswith(".gradsift-"))
                if self.root.is_dir()
                else []
            )
        except OSError as error:
            raise ResourceError(
                f"cannot be read: {error.strerror}",
                where=self.root,
                remedy="Choose another --run folder.",
            ) from error
        if strangers and self._read() is None:
            what = f"is not a run: it holds {strangers[0]!r}" + (
                f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            )
            raise UserError(what, where=self.root, remedy="Choose a new or empty folder for --run.")

    @property
    def exists(self) -> bool:
        """True once run.json is there."""
        return self._read() is not None

    def _read(self) -> dict[str, Any] | None:
        path = self.root / RUN_FILE
        found = read_json(path) if self.root.is_dir() else None
        if found is None or found.get("kind") != _KIND or seal_fault(found):
            if path.exists() and any(self.root.glob(f"*/{RECIPE}")):
                # run.json is damaged; nothing in it is needed to resume
                return {"kind": _KIND, "schema": SCHEMA, "commands": []}
            return None
        check_schema(found, path)
        return found

    def _make(self) -> None:
        make_folder(self.root)
        if not self.exists:
            write_atomic(self.root / RUN_FILE, _run_file([]))

    def _missing(self) -> list[Path]:
        """The folders that making this one makes, the innermost first."""
        return [path for path in (self.root, *self.root.parents) if not path.exists()]

    def _unmake(self, folders: Sequence[Path]) -> None:
        """Removes `folders`, the run's own first, where it holds nothing but its own record."""
        with contextlib.suppress(OSError):
            if {path.name for path in self.root.iterdir()} <= {RUN_FILE, LOCK_FILE}:
                for name in (RUN_FILE, LOCK_FILE):
                    (self.root / name).unlink(missing_ok=True)
                for folder in folders:
                    folder.rmdir()

    # --- commands and the lock

    @property
    def commands(self) -> list[str]:
        """The commands given in this run, oldest first; the last one resumes it. Tokens and
        passwords are blotted out.
        """
        return [entry["command"] for entry in (self._read() or {}).get("commands", [])]

    def record(self, command: str | Sequence[str]) -> str:
        """Keeps `command` in run.json as the one that resumes, and returns it as kept."""
        self._make()
        about = self._read() or {}
        text = readable_command(command)
        entry = {"command": text, "folder": os.getcwd()}
        commands = [known for known in about.get("commands", []) if known != entry]
        write_atomic(self.root / RUN_FILE, _run_file([*commands, entry]))
        return text

    @contextlib.contextmanager
    def lock(self, command: str | Sequence[str] = "") -> Iterator[None]:
        """Holds the run for this process, and records `command` if one is given. The kernel frees
        the lock when the process ends, however it ends. A run that begins here leaves nothing
        behind where the work ends with an error before there is anything to keep.

        Raises UserError naming the holder when another process has it, ResourceError where the
        folder cannot be written.
        """
        if self._held:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1
            return
        missing = None if self.exists else self._missing()
        self._make()
        fd = self._take_lock()
        try:
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S%z"),
                "command": readable_command(command or sys.argv),
            }
            try:
                os.ftruncate(fd, 0)
                os.pwrite(fd, canonical_json(holder), 0)
            except OSError as error:
                raise resource_error(error, self.root / LOCK_FILE) from error
            remove_leftovers(self.root)
            if command:
                self.record(command)
            self._held = 1
            yield
        except BaseException:
            if missing is not None:
                self._unmake(missing)
            raise
        finally:
            self._held = 0
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)

    def _take_lock(self) -> int:
        path = self.root / LOCK_FILE
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise resource_error(error, path) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = read_json(path) or {}
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                remedy = "Put the run on a local disk, or a network one with locks."
                raise ResourceError(
                    f"cannot be locked: {error.strerror}", where=path, remedy=remedy
                ) from error
            raise UserError(
                f"another process works in this run: {_describe(holder)}",
                where=self.root,
                remedy=_WAIT,
            ) from None
        return fd

    # --- artifacts

    def artifact(
        self,
        stage: str,
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        identity: Mapping[str, Any],
        create: bool = True,
    ) -> Artifact:
        """The artifact of this recipe: complete, or an open folder to fill (not made when `create`
        is False).

        Raises IntegrityError when its folder holds something else or its manifest was edited,
        ResourceError, MismatchError (newer schema).
        """
        made_by = recipe(stage, version=version, config=config, inputs=inputs, identity=identity)
        existing = Artifact(self.root, made_by, create=False)
        if not create or existing.complete:
            return existing
        self._make()
        return Artifact(self.root, made_by)

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """Every artifact (of `stage`), complete or not, by folder name. Raises IntegrityError,
        MismatchError for one that cannot be trusted.
        """
        artifacts = (
            Artifact.load(path)
            for path in self._folders()
            if stage is None or path.name.startswith(f"{stage}-")
        )
        return [
            artifact
            for artifact in artifacts
            if artifact is not None and stage in (None, artifact.stage)
        ]

    def trusted(self) -> tuple[list[Artifact], list[IntegrityError | MismatchError]]:
        """The artifacts that can be trusted, and why each of the others cannot (damage, a newer
        schema). Reads manifests alone.
        """
        artifacts: list[Artifact] = []
        faults: list[IntegrityError | MismatchError] = []
        for path in self._folders():
            try:
                artifact = Artifact.load(path)
                if artifact is not None:
                    artifacts.append(artifact)
            except (IntegrityError, MismatchError) as fault:
                faults.append(fault)
        return artifacts, faults

    def latest(self, stage: str) -> Artifact | None:
        """The complete artifact of `stage` that was finished last."""
        done = [artifact for artifact in self.artifacts(stage) if artifact.complete]
        return max(
            done,
            key=lambda artifact: (artifact.stats.get("finished", 0.0), artifact.path.name),
            default=None,
        )

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(
            path
            for path in self.root.iterdir()
            if path.is_dir() and not path.is_symlink() and _has_recipe(path)
        )

    # --- checking and mending

    def verify(self) -> list[Problem]:
        """Hashes every file of every artifact and returns what is wrong, naming the file. Reads
        only.
        """
        own = [
            (self.root / name, known)
            for name, known in _OWN.items()
            if os.path.lexists(self.root / name)
        ]
        problems = [
            Problem("", path.name, what) for path, known in own if (what := own_fault(path, known))
        ]
        return problems + [
            problem for folder in self._folders() for problem in check_folder(folder)
        ]

    def remember(self, problems: Sequence[Problem]) -> bool:
        """Keeps what a verification found, for the next run to `set_aside`; nothing found takes an
        earlier finding away. True: there is some.

        Raises ResourceError where the run cannot be written.
        """
        found = [
            {"artifact": p.artifact, "file": p.file}
            for p in problems
            if p.artifact and not p.remedy
        ]
        path = self.root / FOUND
        if found:
            write_atomic(path, canonical_json({"schema": SCHEMA, "found": found}) + b"\n")
        else:
            _unlink(path)
        return bool(found)

    @property
    def named(self) -> dict[str, set[str]]:
        """Files by artifact folder that the last verification found damaged and no command has set
        aside yet.
        """
        found, named = (read_json(self.root / FOUND) or {}).get("found"), dict[str, set[str]]()
        for entry in found if isinstance(found, list) else []:
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("artifact"), str)
                and isinstance(entry.get("file"), str)
            ):
                named.setdefault(entry["artifact"], set()).add(entry["file"])
        return named

    def set_aside(self) -> list[Problem]:
        """Moves the files that the last verification named into the folder `damaged`, so that a run
        makes anew just those. Use inside `lock`.

        One that is as it was written by now is left alone. Returns, and keeps in `aside`, what was
        moved or missing. Raises ResourceError.
        """
        named = self.named
        for folder in self._folders():
            if files := named.get(folder.name):
                found = [p for p in check_folder(folder, files) if p.file in files and not p.remedy]
                for problem in found:
                    self.discard(problem, aside=True)
                self.aside += found
        if self.named == named:  # else another verification has ended meanwhile
            _unlink(self.root / FOUND)
        return self.aside

    def mended(self) -> list[str]:
        """`aside` as warnings of a result."""
        return [f"set aside as damaged: {problem}" for problem in self.aside]

    def discard(self, problem: Problem, *, aside: bool = False) -> None:
        """Removes what `problem` names, and the manifest that vouched for it, so that the next run
        makes anew just that. Use inside `lock`. What the manifest does not vouch for is made anew
        at once: the recipe, and stats without their times.

        `aside`: what it names is moved into the folder `damaged` of the run, not deleted.
        Raises UserError where no run can make it anew, ResourceError where files cannot be deleted.
        """
        folder = inside(self.root, problem.artifact) if problem.artifact else self.root
        parent, _, last = problem.file.rpartition("/")
        place = inside(folder, parent) if parent else folder
        if problem.remedy or last in ("", ".", ".."):
            raise UserError(
                problem.what, where=folder / problem.file, remedy=problem.remedy or BY_NAME
            )
        if folder == self.root and last == RUN_FILE:
            # what makes the folder a run; nothing in it is needed to resume
            write_atomic(self.root / RUN_FILE, _run_file([]))
            return
        path = place / last  # perhaps a link: then the link is removed
        again = rewritten(folder, last) if place == folder else None
        if aside and os.path.lexists(path):
            # First: killed in between, the file is missing, and still named by the verification. Of
            # an incomplete artifact it would be forgotten.
            _move(path, inside(self.root, f"{ASIDE}/{folder.name}"))
        if again is None and path != folder / MANIFEST:
            # before the file: killed in between, the artifact is merely incomplete
            _unlink(folder / MANIFEST)
        _unlink(path)
        if again is not None:
            write_atomic(path, again)


def _run_file(commands: Sequence[Mapping[str, str]]) -> bytes:
    return (
        canonical_json(sealed({"kind": _KIND, "schema": SCHEMA, "commands": list(commands)}))
        + b"\n"
    )


_WAIT = "Wait for it, or use another --run folder."


def _unlink(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    except OSError as error:
        raise ResourceError(f"cannot be deleted: {error.strerror}", where=path) from error


def _move(path: Path, folder: Path) -> None:
    """Into `folder`, under its own name, or that with a number where an earlier one lies there."""
    make_folder(folder)
    target, number = folder / path.name, 2
    while os.path.lexists(target):
        target, number = folder / f"{path.name}.{number}", number + 1
    try:
        rename(path, target)
    except OSError as error:
        raise resource_error(error, target) from error


def _has_recipe(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MANIFEST, RECIPE))


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder.get("pid"):
        return "it has not said which yet"
    return (
        f"pid {holder['pid']} on {holder.get('host')}, since {holder.get('since')}:"
        f" {holder.get('command')}"
    )
