"""Commands that carry records from one place to another: `autotune export`, `autotune import`, `autotune merge`."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import click

from tilewright.tuner.commands.options import Command, WholeNumber, db_option, json_option
from tilewright.tuner.commands.output import let_go_of_stdout, print_json, say
from tilewright.tuner.temporary import WorkerFolder, remove_abandoned
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import DatabaseCorruptError, UsageError
from tilewright.tuning_db.file import DatabaseFile, open_file, path_for
from tilewright.tuning_db.interchange import Objection, device_key
from tilewright.tuning_db.merging import Merged
from tilewright.tuning_db.merging import check as check_source
from tilewright.tuning_db.merging import merge as merge_files
from tilewright.tuning_db.snapshot import open_snapshot
from tilewright.tuning_db.text import shown
from tilewright.tuning_db.upkeep import overview, refuse_other_devices

STREAM = "-"


@click.command(cls=Command, short_help="Write records to a file or stdout.")
@click.option("--device", required=True, metavar="NAME", help="As for autotune itself.")
@click.option("--kernel", "kernels", multiple=True, metavar="OP", help="Only records of this op; repeatable.")
@click.option(
    "--best",
    type=WholeNumber(min=1),
    metavar="N",
    help="Only the N fastest measured configurations of each problem and toolchain, and the default.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "sqlite"]),
    default="jsonl",
    help="JSON lines, which `autotune import` reads, or a database to be shipped.",
)
@click.option("--output", default=STREAM, metavar="FILE", help="Where to write; stdout by default, as with -.")
@db_option
def export(device: str, kernels: tuple[str, ...], best: int | None, form: str, output: str, db: str | None) -> None:
    """Write what is on record for a device as JSON lines, which `autotune import` reads, or as a database to be shipped
    with the package."""
    from tilewright.kernels.devices import resolve_device
    from tilewright.kernels.registry import find_kernel
    from tilewright.tuner.installation import default_text, objection, present_form
    from tilewright.tuning_db import interchange, shipping
    from tilewright.tuning_db.env import database_dir
    from tilewright.tuning_db.selection import BestFew

    ops = [find_kernel(name).name for name in kernels]
    target = resolve_device(device)
    few = best and BestFew(best, lambda op, problem: default_text(op, problem, target), present_form)
    chosen: dict[str, Any] = {"ops": ops, "best": few}
    if form == "sqlite" and output == STREAM:
        raise UsageError("a database is a file that is opened by its name: --output can't be stdout (-)")
    if output == STREAM and sys.stdout is None:
        raise UsageError("stdout is closed: name a file (--output)")
    if output != STREAM:
        # A shipped file is made again from itself.
        shipping.refuse_database(Path(output), but_shipped=form == "sqlite")
    path = path_for(target.key, database_dir(db))
    with open_snapshot(path) as file:
        refuse_other_devices(file, path, target.key)  # before the first line is out
        if output == STREAM:
            try:
                count = interchange.export(file, target.key, sys.stdout.buffer, **chosen)
                sys.stdout.buffer.flush()
            except OSError as error:
                let_go_of_stdout()
                why = f"stdout can't be written ({error.strerror})"
                raise UsageError(f"{why}: free some space, or name a file (--output)") from None
        else:
            with whole_file(Path(output)) as stream:
                if form == "sqlite":
                    count = shipping.write_database(file, target.key, stream, objection=objection, **chosen)
                else:
                    count = interchange.export(file, target.key, stream, **chosen)
    say(f"{count} records of {target.key} exported" + ("" if output == STREAM else f" to {output}"))
    if form == "sqlite":
        _say_what_is_stale(Path(output))


def _say_what_is_stale(path: Path) -> None:
    """Of a file to be shipped: how much of it will never be answered as measured."""
    from tilewright.tuner.installation import is_of_this_code
    from tilewright.tuning_db.record import Provenance

    view = overview(path)
    predicted = sum(count for (_, provenance), count in view.counts.items() if provenance is Provenance.PREDICTED)
    if predicted:
        say(f"{predicted} of them are predictions, which no lookup asks a shipped file for: --best leaves them out")
    stale = sum(count for revision, count in view.revisions.items() if not is_of_this_code(revision)) - predicted
    if stale:
        say(f"{stale} of them are of other kernels or another timing protocol than these: answered as transferred only")


@click.command("import", cls=Command, short_help="Read what was exported.")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@db_option
@json_option
def import_(files: tuple[str, ...], db: str | None, as_json: bool) -> None:
    """Bring exports into the database of their device; - is stdin. Where one has what is on record, evidence decides.

    Every file is read and checked to its end before the first record is kept.
    """
    from tilewright.tuner.installation import objection
    from tilewright.tuning_db.env import database_dir
    from tilewright.tuning_db.interchange import read_export

    if files.count(STREAM) > 1:
        raise UsageError("stdin (-) can be read once")
    folder = database_dir(db)
    with ExitStack() as stack:
        staging = _staging(stack)
        staged = []
        for number, name in enumerate(files):
            with ExitStack() as reading:
                stream = _opened(name, reading)
                label = "stdin" if name == STREAM else name
                device, file = read_export(stream, label, staging / f"{number}.sqlite", objection)
            stack.callback(file.close)
            staged.append((label, device, file))
        _merge_all(staged, folder, as_json)


def _staging(stack: ExitStack) -> Path:
    """A temporary folder until the end, or until the next import or run where this one is killed."""
    remove_abandoned()
    try:
        folder = WorkerFolder()
    except OSError as error:
        where = tempfile.gettempdir()
        raise UsageError(f"{where} can't be written ({error.strerror}): name another folder in TMPDIR") from None
    stack.callback(folder.remove)
    return folder.path


def _opened(name: str, stack: ExitStack) -> BinaryIO:
    if name == STREAM:
        if sys.stdin is None:
            raise UsageError("stdin is closed: name a file")
        return sys.stdin.buffer
    if not name:
        raise UsageError("the name of a file to import is empty: name one, or - for stdin")
    try:
        return stack.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror}") from None


@click.command(cls=Command, short_help="Read database files of another machine.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@db_option
@json_option
def merge(sources: tuple[str, ...], db: str | None, as_json: bool) -> None:
    """Bring database files of another machine, or a folder of them, into the databases here; they stay as they are.

    Where both have an outcome of the same configuration, evidence decides.
    """
    from tilewright.tuner.installation import objection
    from tilewright.tuning_db.env import database_dir

    paths = []
    for source in map(Path, sources):
        if not source.exists():
            raise UsageError(f"there is no {source}: name a database file, or a folder of *.sqlite")
        found = sorted(source.glob("*.sqlite")) if source.is_dir() else [source]
        if not found:
            raise UsageError(f"{source} has no database: name a file, or a folder of *.sqlite")
        paths += found
    with ExitStack() as stack:
        opened = []
        for path in paths:
            try:
                devices = overview(path).devices
                file = stack.enter_context(open_snapshot(path))
            except DatabaseCorruptError as error:
                raise UsageError(f"{path} is no whole database; an export is for `autotune import`") from error
            if len(devices) > 1:
                raise UsageError(f"{path} has records of several devices, {' and '.join(devices)}: a file is of one")
            if not devices:
                say(f"{path} has no records")
            opened += [(str(path), device, file) for device in devices]
        _merge_all(opened, database_dir(db), as_json, objection)


def _merge_all(
    sources: list[tuple[str, str, DatabaseFile]],
    folder: Path,
    as_json: bool,
    objection: Objection = lambda record: None,
) -> None:
    """Merges each source into the file of its device in `folder`, and says what became of its records; of an end before
    the last of them, too. All are read to their end, and none objected to, before the first record is kept."""
    for name, device, source in sources:
        if (wanted := device_key(device)) is not None:  # an import has looked; a file of databases has any name
            raise UsageError(f"{name}: its records are of {shown(device)}, which must be {wanted}")
        _check_target(path_for(device, folder), device)
        check_source(path_for(device, folder), source, device, objection)
    for device in dict.fromkeys(device for _, device, _ in sources):
        _warn_of_unknown(device)
    document: list[dict[str, Any]] = []
    try:
        for name, device, source in sources:
            target = open_file(path_for(device, folder))
            try:
                merged = merge_files(target, source, device)
            finally:
                target.close()
            if target.set_aside is not None:
                say(f"a damaged database was set aside as {target.set_aside}")
            document.append({"source": name, "device": device, "db": str(target.path), **asdict(merged)})
            if not as_json:
                click.echo(f"{name}: {_described(merged)}; now in {target.path}")
    except BaseException:
        if document:
            if as_json:
                print_json(document)
            say(f"{len(document)} of {len(sources)} sources were brought in: the same command goes on with the others")
        raise
    if as_json:
        print_json(document)


def _check_target(path: Path, device: str) -> None:
    """Does nothing unless the file of a device has records of another; a damaged one is set aside once it is opened to
    write."""
    if path.exists():
        with suppress(DatabaseCorruptError), open_snapshot(path) as file:
            refuse_other_devices(file, path, device)


def _warn_of_unknown(device: str) -> None:
    from tilewright.kernels.catalogue import CATALOGUE
    from tilewright.kernels.live import live_devices

    if all(device != known.key for known in CATALOGUE) and all(device != here.key for here in live_devices()):
        say(
            f"autotune: warning: {device} is neither a board of `autotune devices` nor a GPU that is here: its records "
            "are found where there is one"
        )


def _described(merged: Merged) -> str:
    counts = f"{merged.added} added, {merged.replaced} replaced, {merged.kept} with less evidence than what was there"
    return f"{merged.total} records: {counts}, {merged.known} known"
