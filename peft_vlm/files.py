"""Names of the files in an adapter folder, what identifies its weights, and the release that writes them."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from peft_vlm.errors import AdapterError

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
CARD_NAME = "README.md"


def installed_version() -> str:
    """Version of the installed distribution, `"unknown"` when the package is used from a bare source tree."""
    try:
        return version("peft-vlm")
    except PackageNotFoundError:
        return "unknown"


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of an adapter's weights file; None where there is no such file, as for an id on a Hub.

    Args:
        folder: Local adapter folder.
    """
    path = folder / WEIGHTS_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it.

    Args:
        path: Target; its folder must exist.
        value: JSON value.
        allow_nan: Write `NaN` and `Infinity`, which Python reads and the JSON standard does not know. False: a value
            that holds one is a `ValueError`, and nothing is written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def write_class_names(path: Path, names: Sequence[str]) -> None:
    """Write class names, one a line.

    Args:
        path: Target.
        names: Names without ends of lines, as `check_class_names` leaves them.
    """
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")


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


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
    """
    return json.loads(path.read_text(encoding="utf-8"))


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
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
