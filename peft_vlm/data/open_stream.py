"""Rows of shards, of a dataset in memory or of the Hub, read in order."""

from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, IterableDataset, load_dataset
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature

from peft_vlm.errors import DataError

SHARDS = {"parquet": "*.parquet", "webdataset": "*.tar"}
MEMORY_SHARDS = 240
"""Shards of a dataset in memory: most numbers of processes and workers divide them evenly."""


def open_stream(
    source: str | Path | HFDataset | IterableDataset, *, split: str = "train", columns: Sequence[str] | None = None
) -> IterableDataset:
    """Rows of a dataset that is read as a stream.

    Args:
        source: A stream; a dataset in memory; a folder with parquet files or webdataset tars whose names begin with
            the split, also in its folder `data`; or the id of a dataset on the Hub, which is the only case that uses
            the network.
        split: Part to read.
        columns: Only these, of which alone parquet files are read; None: all.

    Raises:
        DataError: If a folder has no such files, or they cannot be read.
    """
    rows = _opened(source, split, None if columns is None else list(columns))
    return rows if columns is None else rows.select_columns(list(columns))


def _opened(
    source: str | Path | HFDataset | IterableDataset, split: str, columns: list[str] | None
) -> IterableDataset:
    """Rows with at least some columns; those alone where the source can leave the others unread."""
    if isinstance(source, IterableDataset):
        return source
    if isinstance(source, HFDataset):
        if not len(source):
            raise DataError("Expected a dataset with rows, got an empty one.")
        table = source if columns is None else source.select_columns(columns)
        return table.to_iterable_dataset(num_shards=min(MEMORY_SHARDS, len(source)))
    folder = Path(source)
    if not folder.exists():
        return load_dataset(str(source), split=split, streaming=True)
    for builder, pattern in SHARDS.items():
        files = sorted(str(file) for place in (folder, folder / "data") for file in place.glob(f"{split}{pattern}"))
        if not files:
            continue
        options = {"columns": columns} if builder == "parquet" else {}
        try:
            return load_dataset(builder, data_files={split: files}, split=split, streaming=True, **options)
        except ValueError as error:
            raise DataError(
                f"Expected {builder} files that can be read in {str(folder)!r}, got: {error}. Files 'cls' of "
                "webdataset shards hold integers; labels that are texts, as WordNet ids, belong into 'cls.txt'."
            ) from error
    raise DataError(f"Expected '{split}*.parquet' or '{split}*.tar' in {str(folder)!r}, got neither.")


def class_labels(source: IterableDataset, label_column: str) -> list[str] | None:
    """Class names that the stream itself knows; None where its labels are bare numbers or texts.

    Args:
        source: The stream.
        label_column: Column of the label.
    """
    feature = None if source.features is None else source.features.get(label_column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def undecoded(source: IterableDataset, image_column: str) -> IterableDataset:
    """The stream with image files as bytes, so that skipping a row decodes nothing.

    Args:
        source: The stream.
        image_column: Column of the image.
    """
    features = source.features
    if features is not None and isinstance(features.get(image_column), ImageFeature):
        return source.cast_column(image_column, ImageFeature(decode=False))
    return source.decode(False)
