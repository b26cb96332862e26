"""Names of the files in an adapter folder, what identifies its weights, and the release that writes them."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PureWindowsPath
from tempfile import mkdtemp
from types import UnionType
from typing import Any, get_args, get_origin

from peft_vlm.errors import AdapterError, CheckpointError, DataError, shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SUMMARY_NAME = "training_summary.json"
METRICS_NAME = "metrics.json"
CURVE_NAME = "training_curve.png"
#: Evaluation of the adapter, and of the base model alone with the same images and texts.
REPORT_NAME = "report.json"
BASELINE_NAME = "zero_shot.json"
#: Evaluation of a pixel prompt on several multimodal models, with its own baselines, and an image of the prompt.
TRANSFER_NAME = "transfer.json"
PROMPT_IMAGE_NAME = "prompt.png"
#: What became of each tensor of an official checkpoint that the adapter was converted from.
CONVERSION_NAME = "conversion.json"
CLASSES_NAME = "class_names.txt"
#: What a configuration of this package holds beside its settings, for adapters whose configuration is PEFT's own.
FACTS_NAME = "peft_vlm.json"
CARD_NAME = "README.md"
#: Longest JSON file that is read. Parsed, such a file may take twenty times its size.
MAX_JSON_BYTES = 2**24
#: Longest list or table that is read: 5 million lines.
MAX_TEXT_BYTES = 2**29


def installed_version() -> str:
    """Version of the installed distribution, `"unknown"` when the package is used from a bare source tree."""
    try:
        return version("peft-vlm")
    except PackageNotFoundError:
        return "unknown"


def last_part(path: str | PurePath) -> str:
    """Name a folder, a file or a Hub id by its last part, whichever system wrote the path.

    Args:
        path: With slashes or, from Windows, backslashes; `C:\\data\\icons` is `icons` everywhere.
    """
    return PureWindowsPath(path).name


def file_name(text: str) -> str:
    """Turn any text, such as the name of a domain, into part of a file name that every system takes.

    Args:
        text: Any text.
    """
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", text)


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of an adapter's weights file; None where there is no such file, as for an id on a Hub.

    Args:
        folder: Local adapter folder.
    """
    path = folder / WEIGHTS_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one, so that a reader never sees half of it.

    A link in its place is replaced, not followed: the folder may be a stranger's.

    Args:
        path: Target; its folder must exist.
        content: All of it.
    """
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write JSON as `write_bytes` does.

    Args:
        path: Target; its folder must exist.
        value: JSON value.
        allow_nan: Write `NaN` and `Infinity`, which Python reads and the JSON standard does not know. False: a value
            that holds one is a `ValueError`, and nothing is written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


def write_class_names(path: Path, names: Sequence[str]) -> None:
    """Write class names, one a line.

    Args:
        path: Target.
        names: Names without ends of lines, as `check_class_names` leaves them.
    """
    write_bytes(path, "".join(f"{name}\n" for name in names).encode())


def read_class_names_file(path: Path, count: int | None = None) -> list[str]:
    """The names that `write_class_names` wrote. Only a line feed ends one; `splitlines` splits at more characters.

    Args:
        path: The file.
        count: How many there must be; None: unknown.

    Raises:
        AdapterError: If there is another number of names, so that labels would mean other classes.
    """
    names = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    if count is not None and len(names) != count:
        raise AdapterError(
            f"Expected {count} class names in {str(path)!r}, got {len(names)}. The file is cut off or was edited; "
            "copy it again."
        )
    return names


def finite_or_null(value: Any) -> Any:
    """A JSON value whose numbers that are not finite are null, which every reader of JSON knows.

    Args:
        value: JSON value.
    """
    if isinstance(value, dict):
        return {key: finite_or_null(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(path: Path) -> str:
    """Read a list, table or other text of a user, who may have it from anybody.

    Args:
        path: The file, UTF-8 with or without a byte order mark.

    Raises:
        DataError: If it is no regular file, longer than `MAX_TEXT_BYTES`, or no UTF-8 text.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"Expected a file, got {str(path)!r}, which is none. Pass a text file.")
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise DataError(f"Expected {str(path)!r} to have at most {MAX_TEXT_BYTES:,} bytes, got {size:,}. Split it.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        source = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{str(path)!r} is no UTF-8 text ({error}). Save it as UTF-8, for example `iconv -f {source} -t utf-8`."
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file that may come from anybody.

    Args:
        path: The file.

    Raises:
        AdapterError: If it is no regular file, longer than `MAX_JSON_BYTES`, not JSON, or nested too deeply.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise AdapterError(f"Expected a file, got {str(path)!r}, which is none. Write the file again.")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise AdapterError(
                f"Expected {str(path)!r} to have at most {MAX_JSON_BYTES:,} bytes, got {size:,}. It is no file that "
                "this package wrote: get the original."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except AdapterError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise AdapterError(
            f"Expected JSON in {str(path)!r}, got something else ({reason}). The file is damaged: get it again."
        ) from error


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value has the type that a field's annotation names; numbers must be finite.

    Args:
        value: Value, as JSON has it; tuples count as lists.
        kind: Type, union, `Any`, or list, tuple or dictionary of a type.
    """
    if isinstance(kind, UnionType):
        return any(is_of(value, part) for part in get_args(kind))
    if get_origin(kind) in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(is_of(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) in (dict, Mapping):
        return isinstance(value, dict) and all(is_of(entry, get_args(kind)[1]) for entry in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


#: What the parts of a training summary are, where they are there.
SUMMARY_PARTS: dict[str, Any] = {
    "content": dict[str, Any],  # of a file that holds something else
    **dict.fromkeys(("objective", "training", "environment", "metrics"), dict[str, Any] | None),
    **dict.fromkeys(("training_images", "selection"), dict[str, Any] | None),
    **{"data": dict[str, float] | None, "steps": int | None, "epochs": float | None},
}


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The training summary in an adapter folder; None where there is none.

    Args:
        folder: Folder that may come from anybody.

    Raises:
        AdapterError: If it is damaged, or holds values of other types.
    """
    path = file_inside(folder, SUMMARY_NAME)
    if path is None:
        return None
    summary = read_json(path)
    values = summary if isinstance(summary, dict) else {"content": summary}
    wrong = {name: value for name, value in values.items() if not is_of(value, SUMMARY_PARTS.get(name, Any))}
    data = values.get("data")
    if not wrong and data and not {"num_images", "num_classes"} <= set(data):
        wrong["data"] = data
    for name in ("training_images", "selection"):
        images = {} if wrong else values.get(name) or {}
        if not is_of(images.get("sample"), list[str] | None) or not is_of(images.get("count"), int | None):
            wrong[name] = images
    for name, value in wrong.items():
        raise AdapterError(
            f"Expected a training summary in {str(path)!r}, got `{name}` of {shown(value)}. The file is damaged: get "
            "it again, or remove it."
        )
    return summary


def file_inside(folder: Path, name: str) -> Path | None:
    """A file of a folder; None where there is none.

    Links may lead to other places of the folder and, in the cache of a Hub, to the repository's own `blobs`.

    Args:
        folder: Folder that may come from anybody.
        name: Name of the file in it.

    Raises:
        AdapterError: If the name has parts, or what lies there is no regular file or a link that leads out.
    """
    path = folder / name
    if name in ("", ".", "..") or not set(name).isdisjoint("/\\\0"):
        raise AdapterError(f"Expected the name of a file in {str(folder)!r}, got {name!r}. Leave out folders.")
    if not path.exists() and not path.is_symlink():
        return None
    try:
        here, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"Expected {name!r} in {str(folder)!r} to be a file, got a link to itself.") from error
    cached = [parent.parent / "blobs" for parent in (here, *here.parents) if parent.name == "snapshots"]
    if not any(target.is_relative_to(root) for root in (here, *cached)):
        raise AdapterError(
            f"Expected {name!r} to be a file of {str(folder)!r}, got a link to {str(target)!r} outside. Files of an "
            "adapter are read from its own folder only: copy the file there if you trust it."
        )
    if not target.is_file():
        raise AdapterError(f"Expected {name!r} in {str(folder)!r} to be a file, got something else. Remove it.")
    return path


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, moved to its place when the block ends; after an error nothing is left.

    Args:
        folder: Where it goes; must not exist, or be empty.

    Raises:
        AdapterError: If there is something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"Expected a new or empty folder to write to, got {str(folder)!r}, which holds files.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)  # `mkdtemp` makes folders that only their owner may read
        if folder.is_dir():
            folder.rmdir()  # empty; Windows replaces no folder
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


LOCK_NAME = ".run.lock"


def make_folder(folder: Path) -> None:
    """Make the folder of a run.

    Args:
        folder: Folder, which may be there.

    Raises:
        CheckpointError: If it cannot be there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(_unwritable(folder, error)) from error


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"Expected to write to {str(folder)!r}, got {type(error).__name__}: {error}. Free some room, make the folder "
        "writable, or choose another `output_dir`."
    )


@contextmanager
def locked_folder(folder: Path, *, is_main: bool, tell: Callable[[Any], Any]) -> Iterator[None]:
    """Keep a folder for one run: a lock of the system, which goes with the process that holds it, however that ends.

    All processes of a run enter; the main one takes the lock. What the lock's file says is for the message alone.

    Args:
        folder: Folder of the run; made if it is not there.
        is_main: Whether this is the main process.
        tell: Gives the main process's value to all of them.

    Raises:
        CheckpointError: If another run has the folder, or nothing can be written there.
    """
    from filelock import FileLock, Timeout  # commands that only answer start without it

    path, lock, problem = folder / LOCK_NAME, FileLock(folder / LOCK_NAME), None
    if is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        except Timeout:
            problem = (
                f"Expected {str(folder)!r} for this run alone, got another run in it: {_holder(path)}. Wait for it to "
                "end, stop it, or choose another `output_dir`."
            )
        except OSError as error:
            problem = _unwritable(folder, error)
    try:
        if (told := tell(problem)) is not None:
            raise CheckpointError(told)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no file that is open
                path.unlink(missing_ok=True)  # while it is locked: who waits for it finds it gone and makes another
            lock.release()


def _holder(path: Path) -> str:
    """Who has a lock, as its file says."""
    try:
        return shown(path.read_bytes()[:200].decode("utf-8", errors="replace"))
    except OSError:
        return "a process that cannot be told"
