"""Checkpoint folders that are whole or not there: written aside, listed with their hashes, synced, then renamed."""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_vlm.distributed import all_agree, from_main, is_main_process, wait_for_everyone
from peft_vlm.errors import CheckpointError, PeftVLMWarning
from peft_vlm.files import write_json

MANIFEST_NAME = "manifest.json"
PREFIX = "checkpoint-"


@contextmanager
def written_whole(folder: Path, *, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which takes its final name when all of it is on disk; an error leaves nothing of it.

    All processes enter and write their files; the main one lists them and renames the folder.

    Args:
        folder: Final place; what lies there is replaced.
        facts: Further entries of the manifest.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: If a process could not write, for want of room or otherwise.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    failure: Exception | None = None
    try:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        wait_for_everyone()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
        except CheckpointError as error:  # of the adapter's files, which has its own advice
            failure = error.__cause__ if isinstance(error.__cause__, Exception) else error
        except Exception as error:  # of the system, torch and safetensors, each in its own way
            failure = error
        _same_on_all(failure, folder)
        try:
            if is_main_process():
                _finish(partial, folder, facts)
        except OSError as error:
            failure = error
        _same_on_all(failure, folder)
    except BaseException:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _same_on_all(failure: Exception | None, folder: Path) -> None:
    """Fail on every process when it failed on one, so that none waits for the others."""
    if all_agree(failure is None):
        return
    raise CheckpointError(_not_written(failure, folder)) from failure


def _not_written(failure: Exception | None, folder: Path) -> str:
    room = shutil.disk_usage(_existing(folder.parent)).free / 2**20
    reason = "another process failed" if failure is None else f"{type(failure).__name__}: {failure}"
    hint = (
        f"There are {room:.1f} MB free. Free some room, lower `save_total_limit`, or save less often"
        if failure is None or _is_full(failure) or room < 1
        else "Look at the reason"
    )
    return (
        f"Expected to write {str(folder)!r}, got {reason}. {hint}, and go on with `resume_from_checkpoint='auto'`: "
        "nothing half-written is left, and earlier checkpoints are untouched."
    )


def _is_full(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def _finish(partial: Path, folder: Path, facts: dict[str, Any]) -> None:
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    listed = {path.relative_to(partial).as_posix(): {"bytes": _synced(path), "sha256": _hash(path)} for path in files}
    write_json(partial / MANIFEST_NAME, {**facts, "files": listed})
    _synced(partial / MANIFEST_NAME)
    for path in {partial, *(path.parent for path in files)}:
        _sync_folder(path)
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(folder)
    _sync_folder(folder.parent)


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; empty when it is whole.

    Args:
        folder: Checkpoint.
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        listed = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return [f"no {MANIFEST_NAME}, which is written last"]
    except (ValueError, KeyError, TypeError, AttributeError):  # JSON may be damaged and still be JSON
        return [f"{MANIFEST_NAME} is cut off or damaged"]
    found = []
    for name, expected, digest in listed:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found.append(f"{name} is missing")
        elif size != expected:
            found.append(f"{name} is cut off or damaged ({size} of {expected} bytes)")
        elif _hash(path) != digest:
            found.append(f"{name} is cut off or damaged (other content than was written)")
    return found


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none at all; damaged ones are named in a warning and passed by.

    The main process looks, and all processes get its answer.

    Args:
        output_dir: Folder of the run.

    Raises:
        CheckpointError: If there are checkpoints, but no whole one.
    """
    answer = from_main(_look(output_dir) if is_main_process() else None)
    if isinstance(answer, str):
        raise CheckpointError(answer)
    return answer


def _look(output_dir: Path) -> Path | str | None:
    broken: list[str] = []
    for _, folder in sorted(numbered_checkpoints(output_dir).items(), reverse=True):
        found = damage(folder)
        if not found:
            if broken:
                message = (
                    f"Damaged checkpoints are passed by: {'; '.join(broken)}. The run goes on from {folder.name}."
                )
                warnings.warn(message, PeftVLMWarning, stacklevel=2)
            return folder
        broken.append(f"{folder.name}: {', '.join(found)}")
    if broken:
        return (
            f"Expected a whole checkpoint in {str(output_dir)!r}, got damaged ones only: {'; '.join(broken)}. Start "
            "anew in another folder."
        )
    return None


def numbered_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Checkpoints by their step, whole or not.

    Args:
        output_dir: Folder of the run.
    """
    return {
        int(path.name.removeprefix(PREFIX)): path
        for path in output_dir.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    }


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint that is not whole.

    Args:
        folder: Checkpoint.

    Raises:
        CheckpointError: Naming what is wrong.
    """
    found = from_main(damage(folder) if is_main_process() else None)
    if found:
        raise CheckpointError(
            f"Expected a whole checkpoint, got {str(folder)!r}: {', '.join(found)}. Resume from an earlier one, or "
            "let `resume_from_checkpoint='auto'` choose the newest whole one."
        )


@contextmanager
def moved_into(target: Path) -> Iterator[Path]:
    """A folder to write into, whose files are then moved into another, each in one step; an error leaves nothing of
    them. For one process.

    Args:
        target: Where they go; files of the same name are replaced.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: If there was no room, or writing failed otherwise.
    """
    partial = target / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        for path in files:  # all of them, before the first one replaces another
            _synced(path)
        for path in files:
            place = target / path.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    except Exception as error:  # of the system, torch and safetensors, each in its own way
        raise CheckpointError(_not_written(error, target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced(path: Path) -> int:
    """Size of a file, after it has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
