"""How every command opens a run: its settings, its pool and target, its pipeline; and how it hands
over a file.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gradsift.commands.preflight import RUN_SECTIONS, Inputs, check_kept, read_side
from gradsift.compute import machine, threads
from gradsift.compute.progress import Progress, Watched, silent
from gradsift.compute.stopping import interruptible
from gradsift.data.files import container
from gradsift.data.remote import is_url, sent
from gradsift.data.write import copy_file, rewrite
from gradsift.errors import IntegrityError
from gradsift.redaction import readable_command
from gradsift.stages.context import in_force
from gradsift.stages.pipeline import Pipeline
from gradsift.store.artifact import REPAIR, Artifact
from gradsift.store.atomic import make_folder, write_atomic
from gradsift.store.canonical import sealed
from gradsift.store.run import SETTINGS, Run
from gradsift.store.tensors import file_hash


@contextlib.contextmanager
def opened(
    inputs: Inputs,
    *,
    progress: Progress | None = None,
    keep: bool = True,
) -> Iterator[Pipeline]:
    """How every job begins: the pipeline of a run folder over pool and target, under the settings
    the run was made with.

    With `keep`, for jobs that write: the run is locked and remembers the command, what `gradsift
    verify` found damaged is set aside, and a signal stops between two shards.
    """
    folder = Run(Path(inputs.run))
    with contextlib.ExitStack() as stack:
        if keep:
            stack.enter_context(folder.lock(sys.argv))
            stack.enter_context(interruptible(readable_command(sys.argv)))
        pipeline = open_pipeline(folder, inputs, progress or silent(), keep=keep)
        stack.callback(pipeline.executor.close)
        for problem in folder.set_aside() if keep else ():
            # by a command that is not refused: its result tells of it
            pipeline.progress.note(f"set aside as damaged, made anew where it is needed: {problem}")
        yield pipeline


def open_pipeline(run: Run, inputs: Inputs, progress: Progress, *, keep: bool = True) -> Pipeline:
    """Reads pool and target; with `keep`, writes the run's settings down, so that later commands
    agree with them.
    """
    waiting = threads.waiting()
    config, target = in_force(inputs.config(run)), inputs.target_files
    check_kept(run, config)
    candidates = read_side(inputs.pool_files, config, config.pool.group_field, progress)
    group = inputs.target_group or config.target.group_field
    wanted = read_side(target, config, group, progress, "target") if target else None
    for rows in (candidates, wanted) if wanted is not None else (candidates,):
        for line in rows.read_as():
            progress.note(f"{line} rows")
    warmup_from = None if inputs.warmup_from is None else Path(inputs.warmup_from)
    pipeline = Pipeline(run, config, candidates, wanted, warmup_from=warmup_from, progress=progress)
    progress.note(f"device {config.model.device}, dtype {config.model.dtype}")
    if (told := waiting.explain(pipeline.threads)) is not None:
        progress.note(told)
    if config.machine.executor == "serial":
        pipeline.progress = Watched(progress, threads.Watch(pipeline.threads))
    if config.model.dtype in ("bfloat16", "nf4") and machine.emulates_bfloat16(config.model.device):
        progress.note(
            f"{config.model.dtype}: this CPU has no bfloat16 products, and gradients may take ten"
            " times as long as in float32"
        )
    if keep and not (path := run.root / SETTINGS).exists():
        kept = {name: config.model_dump(mode="json")[name] for name in RUN_SECTIONS} | {
            "machine": {"threads": pipeline.threads}
        }
        write_atomic(path, (json.dumps(sealed(kept), indent=2, ensure_ascii=False) + "\n").encode())
    return pipeline


def deliver(artifact: Artifact, name: str, out: str | Path | None) -> Path:
    """The file `name` of a complete artifact; with `out` its rows there, in the container that the
    suffix of `out` names: a copy where that is the file's own. Returns the path of what was
    written unless it is a URL.

    Raises IntegrityError when the file is not the one that was written; DiskFull, ResourceError,
    UserError for a URL that leads nowhere and a container that the rows cannot be written in.
    """
    path = artifact.file(name)
    if file_hash(path) != artifact.manifest["files"][name]:
        raise IntegrityError("is not the file that the manifest names", where=path, remedy=REPAIR)
    if out is None:
        return path
    same = container(out) == container(name)
    if is_url(str(out)):
        if same:
            sent(path, str(out))
            return path
        with tempfile.TemporaryDirectory(prefix="gradsift-") as folder:
            made = Path(folder, Path(str(out).partition("?")[0]).name)
            rewrite(path, made)
            sent(made, str(out))
        return path
    make_folder(Path(out).absolute().parent)
    if same:
        copy_file(path, Path(out))
    else:
        rewrite(path, Path(out))
    return Path(out)
