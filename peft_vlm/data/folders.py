"""Labelled images in files: a folder per class, `metadata.csv`, or lists in CSV files; every part of them at once."""

import csv
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from peft_vlm.data.class_names import check_exists, sort_labels
from peft_vlm.errors import DataError
from peft_vlm.files import last_part, read_text
from peft_vlm.serving.images import find_images, log_once, say_left_out

#: {"image": path, "label": folder name or cell}.
Rows = list[dict[str, str]]
#: Rows of each part by its name, or why it has none.
Parts = dict[str, Rows | DataError]

#: Column of a table that names the split of each row.
SPLIT_COLUMN = "split"
#: Column of a `metadata` file that names the image, as `datasets` calls it.
FILE_COLUMN = "file_name"
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
UNNAMED = "images that `metadata` does not name"
LIST_SUFFIXES = {".csv": ",", ".tsv": "\t"}
#: Folders that hold images of all classes.
CONTAINERS = {"images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "data"}
#: Split of each word that `datasets` takes for one.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_NAME = re.compile(rf"(?:.*[-._ 0-9])?({'|'.join(SPLIT_WORDS)})(?:[-._ 0-9].*)?", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """`train`, `validation` or `test`, where a name of a folder, file or split says so by the rules of `datasets`.

    Args:
        name: Such as "Training", "val" or "test_images".
    """
    match = _SPLIT_NAME.fullmatch(name)
    return None if match is None else SPLIT_WORDS[match[1].lower()]


def in_split_order(names: Iterable[str]) -> list[str]:
    """Names of splits: training, validation, test, others.

    Args:
        names: In any order.
    """
    order = ["train", "validation", "test", None]
    return sorted(names, key=lambda name: (order.index(split_of(name)), name))


def choose_split(names: Iterable[str], split: str | None, *, where: str, advice: str = "") -> str:
    """The part of a source that a split name stands for: of that name, or the only one that means the same.

    Args:
        names: Parts of the source.
        split: Wanted part; None: the only one there is, or `train`.
        where: The source, for the message.
        advice: End of the message.

    Raises:
        DataError: If there is none, or several.
    """
    names = sorted(names)
    if split is None:
        split = names[0] if len(names) == 1 else "train"
    if split in names:
        return split
    same = [name for name in names if split_of(name) is not None and split_of(name) == SPLIT_WORDS.get(split.lower())]
    if len(same) != 1:
        raise DataError(f"{where} has the splits {names!r}, got `split`={split!r}.{advice}")
    return same[0]


def shards_of(root: Path, pattern: str, *, number: str = r"-\d+.*") -> dict[str, list[str]]:
    """Files of each part of a dataset, in a folder and its folder `data`, sorted.

    Args:
        root: The folder.
        pattern: Names of the files.
        number: What follows the name of the part in that of a shard, such as `-00000-of-00002`.
    """
    files: dict[str, list[str]] = {}
    found = [file for folder in (root, root / "data") for file in folder.glob(pattern)]
    for file in sorted(filter(os.path.isfile, found)):
        files.setdefault(re.sub(number, "", file.stem), []).append(str(file))
    return files


def read_files(
    path: Path, split: str | None, columns: Mapping[str, str], *, holdout: float = 0.0
) -> tuple[list[dict[str, str]], list[str], float]:
    """Rows of one part of a list or folder, the raw labels of all parts, and the share of the test if one was drawn.

    Args:
        path: CSV or TSV file, or folder.
        split: Wanted part; None: the only one there is, or `train`.
        columns: `image_column` and `label_column`, in lists and `metadata` files.
        holdout: Share of each class that becomes `test` where files have no parts.

    Returns:
        Rows; labels in the order of their ids; share, 0 where nothing was drawn.

    Raises:
        DataError: If there is no such path or part, or files are missing.
    """
    check_exists(path)
    if not 0 <= holdout < 1:
        raise DataError(f"Expected `holdout` from 0 to below 1, the share of each class, got {holdout!r}.")
    if path.is_dir():
        parts = _read_folder(path, **columns)
        advice = ""
        if list(parts) == ["train"] and not (path / "train").is_dir():
            advice = (
                f" It has no split folders, so all of it is the split 'train'. Make the folders "
                f"{str(path / 'train')!r} and {str(path / str(split))!r}, each with one folder per class."
            )
    else:
        parts = {**_read_list(path, **columns)}
        advice = "" if SPLIT_COLUMN in _header(path) else " A column 'split' says to which split a row belongs."
    whole, share = parts.get("train"), 0.0
    is_named = path.is_file() and split_of(path.stem) is not None
    if holdout and advice and list(parts) == ["train"] and isinstance(whole, list) and not is_named:
        parts, share = {**_hold_out(whole, holdout)}, holdout
        log_once(
            f"{last_part(path)} has no parts: {len(parts['train'])} images are `train`, and {len(parts['test'])}, "
            f"{100 * share:.0f} % of each class drawn by seed 0, are `test`."
        )
    chosen = parts[choose_split(parts, split, where=repr(str(path)), advice=advice)]
    if isinstance(chosen, DataError):
        raise chosen
    check_files_exist([row["image"] for row in chosen])
    rows = [row for part in parts.values() if not isinstance(part, DataError) for row in part]
    return chosen, sort_labels({row["label"] for row in rows}), share


def _hold_out(rows: Rows, share: float) -> dict[str, Rows]:
    """Part images into `train` and `test`, class by class, drawn by seed 0: the same images and share, the same parts.

    At least one image of each class is for the test; a class of one image keeps it for training.
    """
    by_class: dict[str, Rows] = {}
    for row in rows:
        by_class.setdefault(row["label"], []).append(row)
    test: set[int] = set()
    for label in sorted(by_class):
        members = sorted(by_class[label], key=lambda row: row["image"])
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        test |= {id(row) for row in random.Random(f"0 {label}").sample(members, count)}
    return {
        "train": [row for row in rows if id(row) not in test],
        "test": [row for row in rows if id(row) in test],
    }


def _read_folder(root: Path, *, image_column: str, label_column: str) -> Parts:
    """The parts of a folder: lists named after splits, split folders, or all of it as `train`."""
    lists = [path for path in sorted(root.iterdir()) if _is_split_list(path)]
    columns = {"image_column": image_column, "label_column": label_column}
    if lists and all({image_column, label_column} <= set(_header(path)) for path in lists):
        listed: dict[str, Rows] = {}
        for path in lists:
            for name, rows in _read_list(path, **columns).items():
                listed.setdefault(name, []).extend(rows)
        return {**listed}
    files = find_images(root, read_elsewhere=METADATA_NAMES)
    if not files:
        hint = " It holds archives: unpack them." if any(root.glob("*.zip")) or any(root.glob("*.tar*")) else ""
        raise DataError(f"No images in {str(root)!r}. Expected one folder per class with images in it.{hint}")
    folders = _split_folders(root, files)
    labelled = _read_metadata(root, folders, label_column)
    if labelled and not folders and any(SPLIT_COLUMN in row for row in labelled.values()):
        return _by_split_column(root, files, labelled, label_column)
    inside: dict[str, list[Path]] = {name: [] for name in folders}
    for file in files if folders else ():
        inside.setdefault(_parts_below(root, file)[0], []).append(file)
    if loose := [name for name in inside if name not in folders]:
        say_left_out(root, {"images outside the split folders": len(loose)})
    parts: Parts = {}
    for name, part in {name: inside[name] for name in folders}.items() or [("train", files)]:
        try:
            parts[name] = _labelled_rows(root / name if folders else root, part, labelled, label_column)
        except DataError as error:
            parts[name] = error
    _check_classes(root, parts)
    return parts


def _parts_below(folder: Path, file: Path) -> tuple[str, ...]:
    return file.parts[len(folder.parts) :]


def _is_split_list(path: Path) -> bool:
    return path.suffix.lower() in LIST_SUFFIXES and path.is_file() and split_of(path.stem) is not None


def _split_folders(root: Path, files: Sequence[Path]) -> list[str]:
    """Folders below the root that are splits; none where they are classes."""
    parts = [_parts_below(root, file) for file in files]
    names = sorted({path[0] for path in parts if len(path) > 1})
    if all(split_of(name) for name in names):
        return names
    exact = [name for name in names if name.lower() in SPLIT_WORDS]
    if exact:
        others = [name for name in names if name not in exact]
        raise DataError(
            f"{str(root)!r} has the split folders {exact!r} beside {others[:5]!r}, and what is a class is not clear. "
            f"If all are classes, move them into {str(root / 'train')!r}; else move {others[:5]!r} away."
        )
    return []


def _labelled_rows(
    folder: Path, files: Sequence[Path], labelled: Mapping[str, Mapping[str, str]], label_column: str
) -> Rows:
    """Rows of one part, by `metadata` where it names files of it, else by class folders."""
    known = [file for file in files if str(file) in labelled]
    if known:
        say_left_out(folder, {UNNAMED: len(files) - len(known)} if len(files) != len(known) else {})
        return [{"image": str(file), "label": labelled[str(file)][label_column]} for file in known]
    if not files:
        raise DataError(f"No images in {str(folder)!r}. Expected one folder per class with images in it.")
    by_class: dict[str, list[Path]] = {}
    for file in files:
        by_class.setdefault(_parts_below(folder, file)[0], []).append(file)
    loose = [name for name, inside in by_class.items() if inside == [folder / name]]
    classes = {name: inside for name, inside in by_class.items() if name not in loose}
    if not classes:
        raise DataError(
            f"{len(loose)} images lie directly in {str(folder)!r}, which says nothing of their classes. Expected one "
            f"folder per class, or a file 'metadata.csv' there with the columns {[FILE_COLUMN, label_column]!r}."
        )
    say_left_out(folder, {"images outside the class folders": len(loose)} if loose else {})
    _check_class_folders(folder, classes)
    return [{"image": str(file), "label": name} for name in sort_labels(classes) for file in classes[name]]


def _check_class_folders(folder: Path, classes: Mapping[str, Sequence[Path]]) -> None:
    """Refuse folders that are no classes: containers, splits, and folders of folders."""
    names = sorted(classes)
    if len(names) == 1 and names[0].lower() in CONTAINERS:
        raise DataError(
            f"{str(folder)!r} holds the single folder {names[0]!r}, which is no class. Pass "
            f"{str(folder / names[0])!r}, or move what is in it one level up."
        )
    if all(name.lower() in SPLIT_WORDS for name in names):
        raise DataError(f"The class folders of {str(folder)!r} have names of splits, {names!r}. Pass {str(folder)!r}.")
    for name, files in classes.items():
        paths = [_parts_below(folder / name, file) for file in files]
        below = sorted({path[0] for path in paths})
        if len(below) > 1 and all(len(path) > 1 for path in paths):
            raise DataError(
                f"The class folder {str(folder / name)!r} holds folders only, {below[:5]!r}. Pass the folder whose "
                "folders are the classes, or move the images up into their class folders."
            )


def _check_classes(root: Path, parts: Parts) -> None:
    """Refuse one class folder in all parts: it stands one level too high or too low."""
    good = {name: rows for name, rows in parts.items() if not isinstance(rows, DataError)}
    classes = {row["label"] for rows in good.values() for row in rows}
    if len(classes) == 1:
        raise DataError(
            f"{str(root)!r} has one class, {next(iter(classes))!r}, so there is nothing to tell apart. Expected one "
            "folder of images per class: pass the folder above or below."
        )


def _read_metadata(root: Path, folders: Sequence[str], label_column: str) -> dict[str, dict[str, str]]:
    """Rows of all `metadata` files with labels, by image path."""
    labelled: dict[str, dict[str, str]] = {}
    for folder in (root, *(root / name for name in folders)):
        for path in (folder / name for name in METADATA_NAMES):
            rows = list(_metadata_rows(path)) if path.is_file() else []
            if not any(label_column in row for row in rows):
                say_left_out(folder, {f"files {path.name!r} without labels": 1} if rows else {})
                continue
            for number, row in enumerate(rows, start=1):
                if not row.get(FILE_COLUMN) or not row.get(label_column):
                    raise DataError(f"Row {number} of {str(path)!r} has no file name or no label.")
                labelled[str(folder / row[FILE_COLUMN])] = row
            check_files_exist([str(folder / row[FILE_COLUMN]) for row in rows])
    return labelled


def _metadata_rows(path: Path) -> Iterator[dict[str, str]]:
    if path.suffix == ".csv":
        yield from _read_table(path)
        return
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                cells = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
            except (ValueError, AttributeError, RecursionError) as error:
                raise DataError(f"Line {number} of {str(path)!r} is no JSON object: {error}.") from error
            yield {key: str(value) for key, value in cells.items()}


def _by_split_column(
    root: Path, files: Sequence[Path], labelled: Mapping[str, Mapping[str, str]], label_column: str
) -> Parts:
    parts: dict[str, Rows] = {}
    for path, row in labelled.items():
        parts.setdefault(row[SPLIT_COLUMN], []).append({"image": path, "label": row[label_column]})
    missing = len({str(file) for file in files} - set(labelled))
    say_left_out(root, {UNNAMED: missing} if missing else {})
    return {**parts}


def _read_list(path: Path, *, image_column: str, label_column: str) -> dict[str, Rows]:
    """Rows of a CSV file with a header, or of a TSV file, by split; image paths are relative to the file.

    A column `split` says to which part a row belongs; without one the file is the split that it is named after, or
    `train`.
    """
    columns = _header(path)
    if not {image_column, label_column} <= set(columns):
        raise DataError(
            f"Expected the columns {[image_column, label_column]!r} in {str(path)!r}, got {columns!r}. Add a header "
            f"line, separate cells by {LIST_SUFFIXES[path.suffix.lower()]!r}, or name the columns with `image_column` "
            "and `label_column`."
        )
    only = path.stem if split_of(path.stem) else "train"
    parts: dict[str, Rows] = {}
    for number, row in enumerate(_read_table(path), start=2):
        image, label, part = row[image_column], row[label_column], row.get(SPLIT_COLUMN, only)
        if not image or not label or not part:
            raise DataError(f"Line {number} of {str(path)!r} has no image, no label or no split.")
        parts.setdefault(part, []).append({"image": _located(image, path.parent), "label": label})
    if not parts:
        raise DataError(f"{str(path)!r} has a header and no rows.")
    return parts


def _located(image: str, folder: Path) -> str:
    """Path of an image, also one in an archive such as `zip://0.png::images.zip`."""
    inside, archive, place = image.rpartition("::")
    return f"{inside}::{folder / place}" if archive else str(folder / image)


def _header(path: Path) -> list[str]:
    reader = csv.reader(read_text(path).split("\n")[:1], delimiter=_delimiter(path), skipinitialspace=True)
    columns = [column.strip() for column in next(reader, [])]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"Expected each column once in {str(path)!r}, got {twice!r} more than once. Rename one.")
    return columns


def _read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV or TSV file; cells that a short line lacks are empty."""
    lines = read_text(path).split("\n")
    try:
        reader = csv.DictReader((f"{line}\n" for line in lines), delimiter=_delimiter(path), skipinitialspace=True)
        return [
            {key.strip(): (value or "").strip() for key, value in row.items() if key is not None} for row in reader
        ]
    except csv.Error as error:
        raise DataError(f"{str(path)!r} cannot be read as a table: {error}.") from error


def _delimiter(path: Path) -> str:
    return LIST_SUFFIXES.get(path.suffix.lower(), ",")


def check_files_exist(paths: Sequence[str]) -> None:
    """Refuse a list with missing files before hours of work reach them.

    Args:
        paths: Image files of this computer; for one in an archive the archive counts.

    Raises:
        DataError: Naming the first and counting all.
    """
    places = [(path, path.rpartition("::")[2]) for path in paths]
    missing = [path for path, place in places if not os.path.isfile(place)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} image files are missing, the first is {missing[0]!r}. "
            "Check the folder that relative paths start from."
        )
