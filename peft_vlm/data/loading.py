"""Labelled images with class names from a folder, a table, or the Hub; what a source cannot answer is an error."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vlm.data.benchmarks import load_benchmark
from peft_vlm.data.class_names import (
    ClassNames,
    are_numbers,
    check_exists,
    match_labels,
    read_class_names,
    sort_labels,
    warn_of_codes,
)
from peft_vlm.data.dataset import ImageClassificationDataset, check_columns
from peft_vlm.data.folders import (
    LIST_SUFFIXES,
    SPLIT_WORDS,
    choose_split,
    in_split_order,
    read_files,
    shards_of,
    split_of,
)
from peft_vlm.data.images import as_value_range
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.errors import DataError
from peft_vlm.files import read_json
from peft_vlm.serving.images import find_images

if TYPE_CHECKING:
    import datasets


#: Path, id, `datasets.Dataset`, or mapping of splits; everything else gets a message that says what to do.
Source = Any
Names = Sequence[str] | Mapping[Any, str] | None


def load_image_dataset(
    source: Source,
    *,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    class_names: ClassNames | None = None,
    where: Mapping[str, Any] | None = None,
    transform: ImageTransform | None = None,
    seed: int = 0,
    value_range: Sequence[int | float] | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    holdout: float = 0.0,
    data_root: str | Path | None = None,
) -> ImageClassificationDataset:
    """Labelled images with class names from a path, a dataset in memory, or the Hub; `docs/data.md` has the rules.

    Args:
        source: One of

            - a folder with one folder of images per class, `<split>/<class>/` folders, or `metadata.csv` files,
            - a `.csv` or `.tsv` file with a header, or a folder with `train.csv`, `test.csv`, ...; image paths are
              relative to the file; a column `split` names the parts,
            - a folder with `<split>.parquet` or `<split>-*.parquet` (also in its folder `data`), such a file, or a
              folder written by `save_to_disk`,
            - a `datasets.Dataset`, or a `DatasetDict` or other mapping of splits,
            - the id of a dataset on the Hub, which is the only case that uses the network.
        split: Part to read; what a source does not have is an error. A source without parts is `train`, or the split
            that a single `Dataset` or list says it is. None: the only part of a source, or `train`.
        image_column: Column of the image.
        label_column: Column of the label: ids, or names.
        class_names: A list in the order of the ids, a mapping from raw labels (folder names, cells, old names) to
            class names, or a file with either (`read_class_names`). None: those of the source, over all of its parts.
            Raw labels that are all in a list get their place in it; other numbers count as ids; other names are
            renamed in sorted order, if the list has as many, and the log says how.
        where: Keep only rows with these values, such as `{"domain": "pixel"}`; needs a source with such columns.
        transform: Makes the pixels.
        seed: Seed of a random transform.
        value_range: Black and white of images with more than 8 bits; see `read_image`.
        config_name: Configuration of a dataset on the Hub that has several.
        revision: Branch, tag or commit of a dataset on the Hub.
        token: Token of the Hub, for private and gated datasets; None for the one of `hf auth login`.
        holdout: Share of each class, in [0, 1), that files without parts give to a split `test`, drawn by seed 0; the
            rest is `train`. The same share draws the same images. 0: all of it is `train`.
        data_root: The source is a name of `BENCHMARKS`, read from this folder by `load_benchmark`, which gives columns
            and class names; see there.

    Raises:
        DataError: If source, split, column or class names do not fit; the message lists what there is.
    """
    if data_root is not None:
        if class_names is not None:
            raise DataError("Expected no `class_names` with `data_root`: a benchmark has its own. Leave them out.")
        images = load_benchmark(source, data_root, split=_benchmark_split(split))
        images.transform, images.seed, images.value_range = transform, seed, as_value_range(value_range)
        return images
    names = read_class_names(class_names) if isinstance(class_names, str | Path) else class_names
    path = Path(source) if isinstance(source, str | Path) else None
    columns = {"image_column": image_column, "label_column": label_column}
    options: dict[str, Any] = {"transform": transform, "seed": seed, "value_range": value_range}
    if path is not None and (path.suffix.lower() in LIST_SUFFIXES or (path.is_dir() and not _holds_tables(path))):
        if where:
            raise DataError(f"`where` needs a dataset with columns, got {str(path)!r}, with images and labels only.")
        rows, raw_labels, share = read_files(path, split, columns, holdout=holdout)
        ids, labels = match_labels(raw_labels, names)
        dataset = ImageClassificationDataset([row | {"label": ids[row["label"]]} for row in rows], labels, **options)
        dataset.holdout = share
    else:
        place = {"name": config_name, "revision": revision, "token": token}
        table, all_parts = _open_table(source, path, split, label_column, place)
        table = _filtered(table, where)
        check_columns(table, (image_column, label_column))
        table, labels = _named_classes(table, all_parts, label_column, names)
        dataset = ImageClassificationDataset(table, labels, **columns, **options)
    if names is None:
        warn_of_codes(dataset.class_names)
    return dataset


def _benchmark_split(split: str | None) -> str:
    """What CoOp calls a part."""
    word = "train" if split is None else SPLIT_WORDS.get(split.lower(), split)
    return "val" if word == "validation" else word


def _holds_tables(root: Path) -> bool:
    is_saved = (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file()
    return is_saved or bool(shards_of(root, "*.parquet"))


#: Opens all parts of a source in a fixed order, at least their label column.
AllParts = Callable[[], list[Any]]


def _open_table(
    source: Source, path: Path | None, split: str | None, label_column: str, place: Mapping[str, str | None]
) -> "tuple[datasets.Dataset, AllParts]":
    """One part of a source, and all of them."""
    opened: Any = source
    if path is not None and (path.is_dir() or path.suffix.lower() == ".parquet"):
        check_exists(path)
        files = shards_of(path, "*.parquet") if path.is_dir() else {_own_split(path.stem): [str(path)]}
        if files:
            return _open_parquet(path, files, split, label_column)
        opened = _open_saved(path)
    elif path is not None:
        from datasets import ClassLabel, load_dataset

        table = load_from_hub(str(source), split or "train", **place)
        if isinstance(table.features.get(label_column), ClassLabel):  # one list for all parts
            return table, lambda: [table]
        return table, lambda: _in_order(load_dataset(str(source), **place))
    _check_tables(opened)
    if isinstance(opened, Mapping):
        name = choose_split(map(str, opened), split, where="The dataset")
        return opened[name], lambda: _in_order(opened)
    check_own_split(opened, split)
    return opened, lambda: [opened]


def _in_order(parts: "Mapping[str, datasets.Dataset]") -> "list[datasets.Dataset]":
    return [parts[name] for name in in_split_order(parts)]


def check_own_split(table: Any, split: str | None) -> None:
    """Refuse a split that a single dataset or stream is not.

    Args:
        table: It may record its split; else it is `train`.
        split: What it is asked for; None takes it as it is.
    """
    advice = " Leave out `split` to take it as it is, or pass a mapping of splits."
    choose_split([_own_split(str(table.split or "train"))], split, where="The dataset", advice=advice)


def _own_split(name: str) -> str:
    """Split of a single table: what it is named after, or `train`.

    Args:
        name: Name of a file, or of the split that a dataset records, such as `test[:50%]`.
    """
    name = name.partition("[")[0]
    return name if split_of(name) else "train"


def _check_tables(source: Any) -> None:
    """Refuse what is no `datasets.Dataset` and no mapping of them.

    Args:
        source: A source in memory.

    Raises:
        DataError: Naming what fits a stream, or other rows.
    """
    from datasets import Dataset, IterableDataset

    parts = list(source.values()) if isinstance(source, Mapping) else [source]
    if any(isinstance(part, IterableDataset) for part in parts):
        raise DataError(
            "Expected images with positions, got a stream (`IterableDataset`), which has none. Use "
            "`load_image_stream`, or load the dataset without `streaming=True`."
        )
    if not parts or not all(isinstance(part, Dataset) for part in parts):
        kinds = sorted({type(part).__name__ for part in parts}) or ["an empty mapping"]
        raise DataError(
            f"Expected a path, the id of a dataset, a `datasets.Dataset` or a mapping of splits, got {kinds!r}. Make "
            "one with `datasets.Dataset.from_list`, or pass rows to `ImageClassificationDataset`."
        )


def _open_parquet(
    path: Path, files: Mapping[str, list[str]], split: str | None, label_column: str
) -> "tuple[datasets.Dataset, AllParts]":
    name = choose_split(files, split, where=repr(str(path)))
    from datasets import Dataset

    with _readable(path):
        table = Dataset.from_parquet(files[name], split=name)
    ordered = [files[part] for part in in_split_order(files)]

    def all_parts() -> list[Any]:
        with _readable(path):
            return [Dataset.from_parquet(part, columns=[label_column]) for part in ordered]

    return table, all_parts


def _open_saved(root: Path) -> Any:
    """What `save_to_disk` wrote, whose files are looked for in its own folders only."""
    from datasets import load_from_disk

    with _readable(root):
        for state in (file for pattern in ("state.json", "*/state.json") for file in root.glob(pattern)):
            for name in (entry["filename"] for entry in read_json(state)["_data_files"]):
                if Path(name).name != name or not (state.parent / name).is_file():
                    raise ValueError(f"no file {name!r} beside {state.name!r}")
        return load_from_disk(str(root))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within this, what the reader of tables raises for a damaged file is an error of ours."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, DatasetsError) as error:
        raise DataError(f"{str(path)!r} cannot be read as a dataset: {error}. It is damaged: get it again.") from error


def load_from_hub(repo: str, split: str, *, streaming: bool = False, **place: str | None) -> Any:
    """One part of a dataset on the Hub.

    Args:
        repo: Its id.
        split: The part.
        streaming: As an `IterableDataset`.
        **place: Configuration (`name`), `revision` and `token`.

    Raises:
        DataError: If it is a path, there is no such dataset or part, or it cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith(".") or Path(repo).is_file():
        check_exists(Path(repo))
        raise DataError(
            f"{repo!r} is no file that can be read. Expected a folder, a `.csv`, `.tsv` or `.parquet` file, or the id "
            "of a dataset on the Hub; unpack archives."
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(repo, split=split, streaming=streaming, **place)
    except (DatasetsError, FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"{repo!r} is no file or folder here, and it could not be loaded from the Hub as a dataset id: {error}. "
            "Check the spelling, the network, and whether you are logged in for gated data (`hf auth login`)."
        ) from error
    except ValueError as error:
        raise DataError(
            f"The Hub dataset {repo!r} could not be read with `split`={split!r} and "
            f"`config_name`={place.get('name')!r}: {error}"
        ) from error


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
    table: "datasets.Dataset", all_parts: AllParts, label_column: str, names: Names
) -> "tuple[datasets.Dataset, list[str]]":
    """The table with ids as labels, and what they mean: the class list is that of all parts together."""
    from datasets import ClassLabel

    feature = table.features[label_column]
    if isinstance(feature, ClassLabel):
        known: list[str] = []
        for part in all_parts():
            there = part.features.get(label_column)
            known += [name for name in (there.names if isinstance(there, ClassLabel) else ()) if name not in known]
        ids, labels = match_labels(known, names, where=f"The labels in column {label_column!r}")
        if [ids[name] for name in feature.names] == list(range(len(feature.names))):
            return table, labels
        cells = table.with_format(None)[label_column][:]
        return _with_labels(table, label_column, [_id_of(cell, feature.names, ids) for cell in cells]), labels
    raw = _raw_labels(table, label_column)
    found = set(raw)
    if not are_numbers(found) or isinstance(names, Mapping):
        for part in all_parts():
            found |= set(_raw_labels(part, label_column)) if label_column in part.column_names else set()
    ids, labels = match_labels(sort_labels(found), names, where=f"The labels in column {label_column!r}")
    if all(cell == str(ids[cell]) for cell in found) and table.features[label_column].dtype.startswith("int"):
        return table, labels
    return _with_labels(table, label_column, [ids[cell] for cell in raw]), labels


def _id_of(cell: Any, names: Sequence[str], ids: Mapping[str, int]) -> Any:
    """New id of a `ClassLabel` cell; what is no place in its names, as -1 for unknown, stays and is refused later."""
    return ids[names[cell]] if isinstance(cell, int) and 0 <= cell < len(names) else cell


def _raw_labels(table: "datasets.Dataset", label_column: str) -> list[str]:
    """Cells of a label column as texts."""
    texts = []
    for row, cell in enumerate(table.with_format(None)[label_column][:]):
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)
        if not isinstance(cell, str | int):
            raise DataError(
                f"Expected one label per image in column {label_column!r}, a name or a whole number, got {cell!r} in "
                f"row {row}. Leave out images without label, and make one row per label."
            )
        texts.append(str(int(cell)) if isinstance(cell, bool) else str(cell))
    return texts


def _with_labels(table: "datasets.Dataset", label_column: str, labels: Sequence[Any]) -> "datasets.Dataset":
    from datasets import Dataset, concatenate_datasets

    column = Dataset.from_dict({label_column: labels})
    return concatenate_datasets([table.remove_columns(label_column), column], axis=1)


def load_unlabelled_images(
    source: Source,
    class_names: Sequence[str],
    *,
    image_column: str = "image",
    transform: ImageTransform | None = None,
    seed: int = 0,
    value_range: Sequence[int | float] | None = None,
) -> ImageClassificationDataset:
    """A dataset whose labels are all -1. Training on it reports no accuracy, and it cannot be evaluated on.

    Args:
        source: A folder, searched with all its subfolders (whose names mean nothing), or a `datasets.Dataset`, whose
            other columns are not read.
        class_names: Classes that the model is to tell apart, in the order of its prompts.
        image_column: Column of the image.
        transform: Makes the pixels.
        seed: Seed of a random transform.
        value_range: Black and white of images with more than 8 bits; see `read_image`.

    Raises:
        DataError: If the folder does not exist or holds no images.
    """
    if not isinstance(source, str | Path):
        _check_tables(source)
        rows: Any = source
    else:
        rows = [{image_column: str(file)} for file in _images_below(Path(source))]
    return ImageClassificationDataset(
        rows,
        class_names,
        transform=transform,
        image_column=image_column,
        label_column=None,
        seed=seed,
        value_range=value_range,
    )


def _images_below(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"There is no folder {str(root)!r}. Relative paths start from {str(Path.cwd())!r}.")
    files = find_images(root)
    if not files:
        raise DataError(f"No images in {str(root)!r} or its subfolders.")
    return files
