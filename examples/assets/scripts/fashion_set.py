"""The `fashion` set: photos of clothing (Fashion-MNIST), a domain far from icons."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from duplicates import fingerprints, nearest
from parquet_files import png_bytes, write_split
from pixels import IMAGE_SIZE

CLASSES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
IMAGES_PER_CLASS = {"train": 48, "val": 16, "test": 300}
# Photos of one kind of garment are all alike at this resolution; only near-copies count as duplicates here.
PHOTO_THRESHOLD = 0.99


def read_idx(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of a pair of gzipped idx files."""
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), dtype=np.uint8, offset=16)
    return pixels.reshape(-1, 28, 28), np.frombuffer(gzip.decompress(labels.read_bytes()), dtype=np.uint8, offset=8)


def enlarge(photo: np.ndarray) -> np.ndarray:
    """Photo (28, 28) on black to a picture (48, 48) on white, bicubic."""
    inverted = Image.fromarray(255 - photo)
    return np.asarray(inverted.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _first_of_each(labels: np.ndarray, start: int, count: int) -> np.ndarray:
    return np.concatenate([np.flatnonzero(labels == label)[start : start + count] for label in range(len(CLASSES))])


def build_fashion(source: Path, folder: Path) -> None:
    """Write `train.parquet`, `val.parquet` (both from the official training photos) and `test.parquet`."""
    names = {"train": "train", "test": "t10k"}
    data = {
        split: read_idx(source / f"{name}-images-idx3-ubyte.gz", source / f"{name}-labels-idx1-ubyte.gz")
        for split, name in names.items()
    }
    test_rows = _first_of_each(data["test"][1], 0, IMAGES_PER_CLASS["test"])
    pool = _first_of_each(data["train"][1], 0, 4 * (IMAGES_PER_CLASS["train"] + IMAGES_PER_CLASS["val"]))
    test_prints = fingerprints([enlarge(photo) for photo in data["test"][0][test_rows]])
    pool_prints = fingerprints([enlarge(photo) for photo in data["train"][0][pool]])
    pool = pool[nearest(pool_prints, test_prints)[0] <= PHOTO_THRESHOLD]
    pool_labels, count = data["train"][1][pool], IMAGES_PER_CLASS["train"]
    rows = {
        "train": pool[_first_of_each(pool_labels, 0, count)],
        "val": pool[_first_of_each(pool_labels, count, IMAGES_PER_CLASS["val"])],
        "test": test_rows,
    }
    for split, chosen in rows.items():
        photos, labels = data["test" if split == "test" else "train"]
        pngs = [png_bytes(enlarge(photos[row]), grey=True) for row in chosen]
        columns = pd.DataFrame({"source_row": chosen.astype(np.int32)})
        write_split(
            folder / f"{split}.parquet", pngs, {"label": ([CLASSES[labels[row]] for row in chosen], CLASSES)}, columns
        )
        print(f"fashion {split}: {len(chosen)} photos of {len(CLASSES)} classes")
