"""Images and table of a pretraining run: the drawn corpus, or for smoke runs the committed evaluation images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

ASSETS = Path(__file__).resolve().parent.parent


@dataclass
class PretrainingImages:
    """Images with their table rows.

    Attributes:
        images: uint8 (images, 48, 48, 4), straight alpha.
        table: One row per image; see `build_corpus.py`.
    """

    images: np.ndarray
    table: pd.DataFrame

    def __post_init__(self) -> None:
        self._monochrome = torch.tensor(self.table["monochrome"].to_numpy(dtype=bool))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """RGBA images (batch, 48, 48, 4) and whether each is a one-colour drawing (batch,)."""
        return torch.from_numpy(self.images[indices]), self._monochrome[indices]


def in_first_half(name: str) -> bool:
    """Whether a name falls into the half of the names that a `--half` run is trained on; by a hash of the name."""
    return hashlib.sha256(name.encode()).digest()[0] < 128


def load_corpus(folder: Path, *, half: bool = False) -> PretrainingImages:
    """The pretraining side of the corpus that `build_corpus.py` wrote.

    Args:
        folder: Output of that script.
        half: Only the images of half of the names; the other names are taken out of all captions.
    """
    table = pd.read_parquet(folder / "images.parquet")
    used = table["side"] == "pretraining"
    if half:
        used &= table["name"].map(in_first_half)
        table["other_names"] = table["other_names"].map(lambda words: [word for word in words if in_first_half(word)])
    rows = np.flatnonzero(used)
    images = np.load(folder / "images.npy", mmap_mode="r")[rows]
    return PretrainingImages(np.ascontiguousarray(images), table.iloc[rows].reset_index(drop=True))


def load_smoke(num_classes: int = 6) -> PretrainingImages:
    """The committed training shots of the first classes of the icon set, with their class names as captions."""
    shots = Dataset.from_parquet(str(ASSETS / "icons" / "train.parquet"))
    shots = shots.select([row for row, label in enumerate(shots["label"]) if label < num_classes])
    images = np.zeros((len(shots), 48, 48, 4), dtype=np.uint8)
    images[..., 3] = 255 - np.stack([np.asarray(image.convert("L")) for image in shots["image"]])
    names = [shots.features["label"].int2str(label) for label in shots["label"]]
    table = pd.DataFrame({"name": names, "monochrome": True, "kind": "icon", "subgroup": ""})
    table["other_names"] = [[] for _ in names]
    return PretrainingImages(images, table)
