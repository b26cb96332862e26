"""One function that opens whatever holds labelled images, and says what is wrong when it cannot."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, load_dataset, load_from_disk
from datasets import Dataset as HFDataset

from peft_vlm.data.dataset import ImageClassificationDataset, check_columns
from peft_vlm.data.folders import read_csv, read_image_folder, sort_labels
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.errors import DataError

Source = str | Path | HFDataset | Mapping[str, HFDataset]
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
            rows, raw_labels = read_csv(path, split=split, image_column=image_column, label_column=label_column)
        else:
            rows, raw_labels = read_image_folder(path, split=split)
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


def _open_table(source: Source, path: Path | None, split: str) -> HFDataset:
    opened: Any = source
    if path is not None and path.is_dir():
        files = _parquet_files(path, split)
        if files:
            return HFDataset.from_parquet([str(file) for file in files], split=split)
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


def _load_from_hub(name: str, split: str) -> HFDataset:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        _check_exists(Path(name))
    try:
        return load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{name!r} is no file or folder here, and it could not be loaded from the Hub as a dataset id: {error}. "
            "Check the spelling, the network, and whether you are logged in for gated data (`hf auth login`)."
        ) from error
    except ValueError as error:
        raise DataError(f"The Hub dataset {name!r} could not be read with `split`={split!r}: {error}") from error


def _filtered(table: HFDataset, where: Mapping[str, Any] | None) -> HFDataset:
    for column, value in (where or {}).items():
        check_columns(table, (column,))
        cells = table.with_format(None)[column][:]
        rows = [row for row, cell in enumerate(cells) if cell == value]
        if not rows:
            raise DataError(f"No row has {value!r} in column {column!r}, which holds {sorted(set(cells))[:20]!r}.")
        table = table.select(rows)
    return table


def _named_classes(
    table: HFDataset, label_column: str, names: Sequence[str] | Mapping[str, str] | None
) -> tuple[HFDataset, list[str]]:
    feature = table.features[label_column]
    if isinstance(feature, ClassLabel):
        return table, _renamed(feature.names, names)
    cells = table.with_format(None)[label_column][:]
    if all(isinstance(cell, str) for cell in cells):
        ids, labels = _name_raw_labels(sort_labels(set(cells)), names)
        column = HFDataset.from_dict({label_column: [ids[cell] for cell in cells]})
        return datasets.concatenate_datasets([table.remove_columns(label_column), column], axis=1), labels
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
