"""Labelled images on disk: a folder per class, or a CSV file."""

import csv
from collections.abc import Sequence
from pathlib import Path

from peft_vlm.data.images import IMAGE_EXTENSIONS
from peft_vlm.errors import DataError

#: Rows {"image": path, "label": folder name or cell}, and the raw labels of all splits in the order of their ids.
Rows = list[dict[str, str]]

#: Column of a CSV file that names the split of each row.
SPLIT_COLUMN = "split"


def read_image_folder(root: Path, *, split: str) -> tuple[Rows, list[str]]:
    """Images of `root/<split>/<class>/...`, or of `root/<class>/...`, which has the split `train` only.

    Files and classes are in sorted order (numerically when all class folders are numbers); hidden files and files that
    are no images by their extension are left out. The classes are those of all splits together.

    Args:
        root: The folder.
        split: Name of the part.

    Raises:
        DataError: If there is no such split, or no class folder with images.
    """
    splits = {folder.name: folder for folder in _folders(root) if _is_split(folder)}
    if splits and split not in splits:
        raise DataError(f"{str(root)!r} has the splits {sorted(splits)!r}, got `split`={split!r}.")
    if not splits and split != "train":
        raise DataError(
            f"{str(root)!r} has no split folders, so all of it is the split 'train'; got `split`={split!r}. "
            f"Make the folders {str(root / 'train')!r} and {str(root / split)!r}, each with one folder per class."
        )
    raw_labels = sort_labels({folder.name for part in splits.values() or [root] for folder in _folders(part)})
    rows = [
        {"image": str(file), "label": label}
        for label in raw_labels
        for file in sorted((splits.get(split, root) / label).rglob("*"))
        if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith(".")
    ]
    if not rows:
        raise DataError(
            f"No images in {str(splits.get(split, root))!r}. Expected one folder per class with images in it."
        )
    return rows, raw_labels


def read_csv(path: Path, *, split: str, image_column: str, label_column: str) -> tuple[Rows, list[str]]:
    """Rows of a CSV file with a header; image paths are relative to the file.

    A column `split` says to which part a row belongs; a file without it is the split `train`. The classes are those of
    all splits together.

    Args:
        path: The file, UTF-8, separated by commas.
        split: Name of the part.
        image_column: Column of the image paths.
        label_column: Column of the labels: numbers, or names.

    Raises:
        DataError: If a column or the split is not there, a cell is empty, or images are missing.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        if not {image_column, label_column} <= set(columns):
            raise DataError(
                f"Expected the columns {[image_column, label_column]!r} in {str(path)!r}, got {columns!r}. Add a "
                "header line, or name the columns with `image_column` and `label_column`."
            )
        cells = [(row[image_column], row[label_column], row.get(SPLIT_COLUMN, "train")) for row in reader]
    if not cells:
        raise DataError(f"{str(path)!r} has a header and no rows.")
    empty = [number for number, row in enumerate(cells, start=2) if not all(row)]
    if empty:
        raise DataError(f"Line {empty[0]} of {str(path)!r} has no image, no label or no split.")
    splits = sorted({part for _, _, part in cells})
    if split not in splits:
        advice = "" if SPLIT_COLUMN in columns else f" A column {SPLIT_COLUMN!r} says to which split a row belongs."
        raise DataError(f"{str(path)!r} has the splits {splits!r}, got `split`={split!r}.{advice}")
    rows = [{"image": str(path.parent / image), "label": label} for image, label, part in cells if part == split]
    check_files_exist([row["image"] for row in rows])
    return rows, sort_labels({label for _, label, _ in cells})


def check_files_exist(paths: Sequence[str]) -> None:
    """Refuse a list with missing files before hours of work reach them.

    Args:
        paths: Image files.

    Raises:
        DataError: Naming the first and counting all.
    """
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} image files are missing, the first is {missing[0]!r}. "
            "Check the folder that relative paths start from."
        )


def sort_labels(labels: set[str]) -> list[str]:
    """Labels in the order of their ids: numerically when all are numbers (as ImageNet-V2's folders), else as text."""
    return sorted(labels, key=(lambda label: (int(label), label)) if all(x.isdecimal() for x in labels) else None)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_split(folder: Path) -> bool:
    return folder.name in {"train", "val", "valid", "validation", "test"} and bool(_folders(folder))
