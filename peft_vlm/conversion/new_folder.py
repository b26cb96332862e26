"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from peft_vlm.errors import AdapterError


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
