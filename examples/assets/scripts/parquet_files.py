"""Write images with class labels as parquet files that `datasets` opens with `Image` and `ClassLabel` features."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from pixels import on_white


def png_bytes(image: np.ndarray, *, grey: bool) -> bytes:
    """PNG file of an image over white: RGBA (48, 48, 4) or already grey (rows, columns)."""
    if image.ndim == 3:
        picture = PILImage.fromarray(on_white(image))
        picture = picture.convert("L") if grey else picture
    else:
        picture = PILImage.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_split(
    path: Path, pngs: list[bytes], labels: dict[str, tuple[list[str], list[str]]], columns: pd.DataFrame
) -> None:
    """Write one parquet file.

    Args:
        path: File to write.
        pngs: PNG bytes of each row.
        labels: For each label column its value per row (a name) and all names in order.
        columns: Further columns.
    """
    features = {"image": Image()}
    data: dict[str, list] = {"image": [{"bytes": png, "path": None} for png in pngs]}
    for column, (values, names) in labels.items():
        features[column] = ClassLabel(names=names)
        index = {name: position for position, name in enumerate(names)}
        data[column] = [index[value] for value in values]
    kinds = {"b": "bool", "f": "float32", "i": "int32"}
    for column in columns:
        features[column] = Value(kinds.get(columns[column].dtype.kind, "string"))
        data[column] = columns[column].tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(data, features=Features(features)).to_parquet(path)
