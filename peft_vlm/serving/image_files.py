"""Image files below a folder: found by name or content, and what is left out is counted."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

from .images import is_raster_image, raster_suffixes

logger = logging.getLogger(__name__)


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def say_left_out(root: Path, counts: Mapping[str, int]) -> None:
    """Log what is left out of a folder, once per process.

    Args:
        root: The folder.
        counts: Numbers by what it is.
    """
    if counts:
        listed = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
        _say_once(f"Left out of {str(root)!r}: {listed}.")


def find_images(root: Path, *, read_elsewhere: Collection[str] = ()) -> list[Path]:
    """Image files below a folder in sorted order: those whose name or content says so.

    Links are followed; hidden files and folders, `__MACOSX`, circles of links, empty folders and other files are left
    out and counted in the log.

    Args:
        root: The folder.
        read_elsewhere: Names of files that are not counted.
    """
    left_out: Counter[str] = Counter()
    files = []
    for path in sorted(_walk(root, (os.path.realpath(root),), left_out)):
        if is_image_file(path):
            files.append(path)
        elif path.name not in read_elsewhere:
            left_out[f"files {path.suffix.lower()!r}" if path.suffix else "files without ending"] += 1
    say_left_out(root, left_out)
    return files


def _walk(folder: Path, above: tuple[str, ...], left_out: Counter[str]) -> Iterator[Path]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if not entries:
        left_out["empty folders"] += 1
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            left_out["hidden files and folders"] += 1
        elif entry.is_dir():
            place = os.path.realpath(entry.path)
            if place in above:
                left_out["links in a circle"] += 1
            else:
                yield from _walk(folder / entry.name, (*above, place), left_out)
        else:
            yield folder / entry.name


def is_image_file(path: Path) -> bool:
    """True if name or content of a file say that it is a raster image; which one, its content decides.

    Args:
        path: A path; links are followed, and pipes and devices are no files.
    """
    if not path.is_file():
        return False
    if path.suffix.lower() in raster_suffixes():
        return True
    try:
        with path.open("rb") as file:
            return is_raster_image(file.read(16))
    except OSError:
        return False
