"""Results as JSON files."""

import json
import math
from pathlib import Path
from typing import Any


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
