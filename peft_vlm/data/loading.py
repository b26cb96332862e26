"""Labelled images on disk: a folder per class, or a CSV file."""

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_vlm.data.dataset import ImageClassificationDataset, check_columns, is_hf_dataset
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.errors import DataError
from peft_vlm.serving.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    import datasets

#: Rows {"image": path, "label": folder name or cell}, and the raw labels of all splits in the order of their ids.
Rows = list[dict[str, str]]

#: Column of a CSV file that names the split of each row.
SPLIT_COLUMN = "split"


def _read_image_folder(root: Path, *, split: str) -> tuple[Rows, list[str]]:
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
    raw_labels = _sort_labels({folder.name for part in splits.values() or [root] for folder in _folders(part)})
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


def _read_csv(path: Path, *, split: str, image_column: str, label_column: str) -> tuple[Rows, list[str]]:
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
    return rows, _sort_labels({label for _, label, _ in cells})


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


def _sort_labels(labels: set[str]) -> list[str]:
    """Labels in the order of their ids: numerically when all are numbers (as ImageNet-V2's folders), else as text."""
    return sorted(labels, key=(lambda label: (int(label), label)) if all(x.isdecimal() for x in labels) else None)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_split(folder: Path) -> bool:
    return folder.name in {"train", "val", "valid", "validation", "test"} and bool(_folders(folder))


Source: TypeAlias = "str | Path | datasets.Dataset | Mapping[str, datasets.Dataset]"
ClassNames = Sequence[str] | Mapping[str, str] | str | Path


def load_image_dataset(
    source: Source,
    *,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    class_names: ClassNames | None = None,
    where: Mapping[str, Any] | None = None,
    transform: ImageTransform | None = None,
    seed: int = 0,
) -> ImageClassificationDataset:
    """Labelled images with class names from a path, a dataset in memory, or the Hub.

    Args:
        source: One of

            - a folder with one folder of images per class, or `<split>/<class>/` folders,
            - a folder with `<split>.parquet` or `<split>-*.parquet` (also in its folder `data`), or one written by
              `save_to_disk`,
            - a `.csv` file with a header; image paths are relative to it; a column `split` names the parts,
              without one all rows are the split `train`,
            - a `datasets.Dataset`, or a `DatasetDict` or other mapping of splits,
            - the id of a dataset on the Hub, which is the only case that uses the network.
        split: Part to read; ignored for a single `Dataset`.
        image_column: Column of the image.
        label_column: Column of the label: ids, or names.
        class_names: A list in the order of the ids, a mapping from raw labels (folder names, cells, old names) to
            class names, or a file with either (`read_class_names`). None: those of the source. Raw labels that are all
            in a list get their place in it; other numbers count as ids; other names are renamed in sorted order, if
            the list has as many.
        where: Keep only rows with these values, such as `{"domain": "pixel"}`; needs a source with such columns.
        transform: Makes the pixels.
        seed: Seed of a random transform.

    Raises:
        DataError: If source, split, column or class names do not fit; the message lists what there is.
    """
    names = read_class_names(class_names) if isinstance(class_names, str | Path) else class_names
    path = Path(source) if isinstance(source, str | Path) else None
    options: dict[str, Any] = {"transform": transform, "seed": seed}
    if path is not None and (path.suffix == ".csv" or (path.is_dir() and not _holds_tables(path))):
        if where:
            raise DataError(f"`where` needs a dataset with columns, got {str(path)!r}, with images and labels only.")
        _check_exists(path)
        if path.suffix == ".csv":
            rows, raw_labels = _read_csv(path, split=split, image_column=image_column, label_column=label_column)
        else:
            rows, raw_labels = _read_image_folder(path, split=split)
        ids, labels = _name_raw_labels(raw_labels, names)
        return ImageClassificationDataset([row | {"label": ids[row["label"]]} for row in rows], labels, **options)
    table = _filtered(_open_table(source, path, split), where)
    check_columns(table, (image_column, label_column))
    table, labels = _named_classes(table, label_column, names)
    columns = {"image_column": image_column, "label_column": label_column}
    return ImageClassificationDataset(table, labels, **columns, **options)


def read_class_names(path: str | Path) -> list[str] | dict[str, str]:
    """Class names from a file.

    Args:
        path: A `.json` file with a list of names or a mapping from raw labels to names; or a text file with one name
            per line, or with lines `n01440764 tench` (as CoOp's `classnames.txt`), which make a mapping.

    Raises:
        DataError: If the file is not there or holds something else.
    """
    path = Path(path)
    _check_exists(path)
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".json":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [re.fullmatch(r"(n\d{8}) (.+)", line) for line in lines]
        return {pair[1]: pair[2] for pair in pairs if pair} if lines and all(pairs) else lines
    names = json.loads(text)
    values = names.values() if isinstance(names, dict) else names
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in values):
        raise DataError(f"Expected {str(path)!r} to hold a list of names, or a mapping from labels to names.")
    return names


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise DataError(f"There is no {str(path)!r}. Relative paths start from {str(Path.cwd())!r}.")


def _parquet_files(root: Path, split: str) -> list[Path]:
    return sorted(
        file
        for folder in (root, root / "data")
        for file in folder.glob("*.parquet")
        if re.fullmatch(rf"{re.escape(split)}(-\d+.*)?", file.stem)
    )


def _holds_tables(root: Path) -> bool:
    is_saved = (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file()
    return is_saved or any(root.glob("*.parquet")) or any(root.glob("data/*.parquet"))


def _open_table(source: Source, path: Path | None, split: str) -> "datasets.Dataset":
    from datasets import Dataset, load_from_disk

    opened: Any = source
    if path is not None and path.is_dir():
        files = _parquet_files(path, split)
        if files:
            return Dataset.from_parquet([str(file) for file in files], split=split)
        if any(path.rglob("*.parquet")):
            there = sorted({re.sub(r"-\d+.*", "", file.stem) for file in path.rglob("*.parquet")})
            raise DataError(f"{str(path)!r} has the splits {there!r}, got `split`={split!r}.")
        opened = load_from_disk(str(path))
    elif path is not None:
        opened = _load_from_hub(str(source), split)
    if isinstance(opened, Mapping):
        if split not in opened:
            raise DataError(f"The dataset has the splits {sorted(opened)!r}, got `split`={split!r}.")
        return opened[split]
    return opened


def _load_from_hub(name: str, split: str) -> "datasets.Dataset":
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        _check_exists(Path(name))
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, split=split)
    except (DatasetsError, FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{name!r} is no file or folder here, and it could not be loaded from the Hub as a dataset id: {error}. "
            "Check the spelling, the network, and whether you are logged in for gated data (`hf auth login`)."
        ) from error
    except ValueError as error:
        raise DataError(f"The Hub dataset {name!r} could not be read with `split`={split!r}: {error}") from error


def _filtered(table: "datasets.Dataset", where: Mapping[str, Any] | None) -> "datasets.Dataset":
    for column, value in (where or {}).items():
        check_columns(table, (column,))
        cells = table.with_format(None)[column][:]
        rows = [row for row, cell in enumerate(cells) if cell == value]
        if not rows:
            raise DataError(f"No row has {value!r} in column {column!r}, which holds {sorted(set(cells))[:20]!r}.")
        table = table.select(rows)
    return table


def _named_classes(
    table: "datasets.Dataset", label_column: str, names: Sequence[str] | Mapping[str, str] | None
) -> "tuple[datasets.Dataset, list[str]]":
    from datasets import ClassLabel, Dataset, concatenate_datasets

    feature = table.features[label_column]
    if isinstance(feature, ClassLabel):
        return table, _renamed(feature.names, names)
    cells = table.with_format(None)[label_column][:]
    if all(isinstance(cell, str) for cell in cells):
        ids, labels = _name_raw_labels(_sort_labels(set(cells)), names)
        column = Dataset.from_dict({label_column: [ids[cell] for cell in cells]})
        return concatenate_datasets([table.remove_columns(label_column), column], axis=1), labels
    if names is None or isinstance(names, Mapping):
        raise DataError(
            f"The labels in column {label_column!r} are numbers without names. Pass `class_names` as a list in label "
            "order."
        )
    return table, list(names)


def _renamed(old: list[str], names: Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """Class names for ids that have names already."""
    if names is None:
        return old
    if isinstance(names, Mapping):
        _check_covered(old, names)
        return [names[name] for name in old]
    if len(names) != len(old):
        raise DataError(f"Expected {len(old)} class names, one per label of the dataset, got {len(names)}.")
    return list(names)


def _name_raw_labels(
    raw_labels: list[str], names: Sequence[str] | Mapping[str, str] | None
) -> tuple[dict[str, int], list[str]]:
    """Label ids of folder names or cells: by name where the list has them all, else as numbers or by position."""
    are_numbers = all(raw.isdecimal() for raw in raw_labels)
    if names is None and are_numbers:
        raise DataError(
            "The labels are numbers without names. Pass `class_names` as a list in label order, or as a mapping."
        )
    by_position = {raw: index for index, raw in enumerate(raw_labels)}
    if names is None:
        return by_position, raw_labels
    if isinstance(names, Mapping):
        _check_covered(raw_labels, names)
        return by_position, [names[raw] for raw in raw_labels]
    by_name = {name: index for index, name in enumerate(names)}
    unknown = [raw for raw in raw_labels if raw not in by_name]
    if not unknown:
        return by_name, list(names)
    if are_numbers:
        return {raw: int(raw) for raw in raw_labels}, list(names)
    if len(unknown) == len(raw_labels) == len(names):
        return by_position, list(names)
    raise DataError(
        f"{len(unknown)} of {len(raw_labels)} labels are not among the {len(names)} class names, the first is "
        f"{unknown[0]!r}. Pass a mapping from label to class name, or as many names as there are labels."
    )


def _check_covered(raw_labels: Sequence[str], names: Mapping[str, str]) -> None:
    missing = [raw for raw in raw_labels if raw not in names]
    if missing:
        raise DataError(f"The mapping of class names lacks {len(missing)} labels, the first is {missing[0]!r}.")


def load_unlabelled_images(
    source: "str | Path | datasets.Dataset",
    class_names: Sequence[str],
    *,
    image_column: str = "image",
    transform: ImageTransform | None = None,
    seed: int = 0,
) -> ImageClassificationDataset:
    """A dataset whose labels are all -1. Training on it reports no accuracy, and it cannot be evaluated on.

    Args:
        source: A folder, searched with all its subfolders (whose names mean nothing), or a `datasets.Dataset`, whose
            other columns are not read.
        class_names: Classes that the model is to tell apart, in the order of its prompts.
        image_column: Column of the image.
        transform: Makes the pixels.
        seed: Seed of a random transform.

    Raises:
        DataError: If the folder does not exist or holds no images.
    """
    if is_hf_dataset(source):
        rows: Any = source
    else:
        rows = [{image_column: str(file)} for file in _images_below(Path(source))]
    return ImageClassificationDataset(
        rows, class_names, transform=transform, image_column=image_column, label_column=None, seed=seed
    )


def _images_below(root: Path) -> list[Path]:
    """Image files in sorted order; hidden ones are left out."""
    if not root.is_dir():
        raise DataError(f"There is no folder {str(root)!r}. Relative paths start from {str(Path.cwd())!r}.")
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise DataError(f"No images in {str(root)!r} or its subfolders.")
    return files


logger = logging.getLogger(__name__)

_ID_LINE = re.compile(r"(n\d{8})[\t ]+(.+)")
_NOUN_LINE = re.compile(r"(\d{8}) \d{2} n ([0-9a-f]{2}) (.+)")


def read_class_list(path: str | Path) -> list[str] | dict[str, str]:
    """Names in label order, or by WordNet id, all different.

    Args:
        path: A file that `read_class_names` reads; lines `n01440764<tab or space>tench, Tinca tinca` (ImageNet's
            `words.txt`), of which the first word counts; or WordNet's `data.noun`.

    Returns:
        A list, or a mapping from WordNet id to name. Of several classes with one name, such as the bird and the
        machine called crane, each gets its second word in brackets, or its id where it has no other word.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_class_names(path)
    lines = [line.rstrip() for line in path.read_text(encoding="utf-8-sig").splitlines()] if path.is_file() else []
    words = _noun_words(lines) or _id_words(lines)
    return _distinct_names(words) if words else read_class_names(path)


def _id_words(lines: list[str]) -> dict[str, list[str]]:
    """Words by id where every line is `id words`; empty otherwise."""
    pairs = [_ID_LINE.fullmatch(line) for line in lines if line]
    if not pairs or not all(pairs):
        return {}
    return {pair[1]: [word.strip().replace("_", " ") for word in pair[2].split(",")] for pair in pairs if pair}


def _noun_words(lines: list[str]) -> dict[str, list[str]]:
    """Words by id from WordNet's `data.noun`: empty for other files.

    A line is offset, file number, type, number of words in hex, words; the licence text in front is indented.
    """
    entries = [_NOUN_LINE.match(line) for line in lines if line and not line.startswith("  ")]
    if not entries or not all(entries):
        return {}
    words = {}
    for entry in entries:
        if entry is not None:
            cells = entry[3].split(" ")[: 2 * int(entry[2], 16) : 2]
            words[f"n{entry[1]}"] = [cell.replace("_", " ") for cell in cells]
    return words


def _distinct_names(words: Mapping[str, list[str]]) -> dict[str, str]:
    """A different name for each class, the first of its words where no other class has it.

    Args:
        words: Words of each class by its id, the commonest first.
    """
    first = Counter(entry[0].lower() for entry in words.values())
    names, changed = {}, 0
    for key, entry in words.items():
        name = entry[0]
        if first[name.lower()] > 1:
            changed += 1
            name = f"{name} ({entry[1] if len(entry) > 1 else key})"
        names[key] = name
    taken = Counter(name.lower() for name in names.values())
    for key, name in names.items():
        if taken[name.lower()] > 1:
            names[key] = f"{name} ({key})"
    if changed:
        logger.info("%d of %d classes share their first word and got a second in brackets.", changed, len(words))
    return names
