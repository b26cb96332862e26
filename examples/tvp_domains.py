"""Two domains that the bundled multimodal models are weak in, for train_tvp.py.

`lamplight`: which colour is an icon drawn in, seen under warm light? The models distinguish eleven colours in
daylight; under warm light they get about a third of that right. `fashion`: which garment is on a photo
(Fashion-MNIST), by names that the models were trained to write? They were trained on drawings, not on photos.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Features, load_dataset
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature
from PIL import Image

from peft_vlm.data import load_image_dataset
from peft_vlm.data.dataset import ImageClassificationDataset

ASSETS = Path(__file__).parent / "assets"
DOMAINS = {"lamplight": "what colour is it?", "fashion": "what is this?"}

#: Share of red, green and blue that each light contains; daylight contains all.
LIGHTS = {
    "daylight": (1.0, 1.0, 1.0),
    "warm_light": (1.0, 0.72, 0.42),
    "dim_warm_light": (0.75, 0.54, 0.32),
    "cold": (0.55, 0.8, 1.0),
}

#: The inks that the models were trained on (assets/scripts/mllm_questions.py).
INKS = {
    "black": (0.05, 0.05, 0.05),
    "grey": (0.5, 0.5, 0.5),
    "white": (0.97, 0.97, 0.97),
    "red": (0.8, 0.1, 0.1),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "purple": (0.5, 0.15, 0.6),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.27, 0.12),
}
ICONS_PER_INK = {"train": 100, "val": 20, "test": 50}

#: Class names of Fashion-MNIST in words that occur among the models' training names.
GARMENTS = {
    **{name: name for name in ("dress", "coat", "sandal", "shirt", "bag")},
    **{"t-shirt": "t shirt", "trousers": "pants", "pullover": "sweater", "sneaker": "shoe", "ankle boot": "boot"},
}


def load_domain(name: str, *, split: str) -> ImageClassificationDataset:
    """Labelled images of one of `DOMAINS`.

    Args:
        name: Key of `DOMAINS`.
        split: `"train"`, `"val"` or `"test"`; no icon family is in two splits.
    """
    if name == "fashion":
        return load_image_dataset(ASSETS / "fashion", split=split, class_names=GARMENTS)
    return load_image_dataset(inked_icons(split, LIGHTS["warm_light"]))


def inked_icons(split: str, light: Sequence[float]) -> HFDataset:
    """Plain icons, each in one of the inks on a light or dark ground, seen in some light; as many of each ink.

    Args:
        split: Split of the icons.
        light: Share of red, green and blue.
    """
    icons = load_dataset("parquet", data_files=str(ASSETS / "icons" / f"{split}.parquet"), split="train")
    plain = [row for row, domain in enumerate(icons["domain"]) if domain == "plain"]
    count = ICONS_PER_INK[split] * len(INKS)
    chosen = np.random.default_rng(0).permutation(plain)[:count]
    labels = [row % len(INKS) for row in range(count)]
    inks = list(INKS.values())
    images = [_inked(icons[int(row)]["image"], inks[label], light) for row, label in zip(chosen, labels, strict=True)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(INKS))})
    return HFDataset.from_dict({"image": images, "label": labels}, features=features)


def named_icons(split: str, light: Sequence[float], *, every: int = 11) -> HFDataset:
    """Plain icons of every eleventh class in some light, with their names as classes.

    Args:
        split: Split of the icons.
        light: Share of red, green and blue.
        every: One class in so many.
    """
    icons = load_dataset("parquet", data_files=str(ASSETS / "icons" / f"{split}.parquet"), split="train")
    names = icons.features["label"].names
    pairs = zip(icons["label"], icons["domain"], strict=True)
    rows = [row for row, (label, domain) in enumerate(pairs) if domain == "plain" and label % every == 0]
    images = [_lit(np.asarray(icons[row]["image"].convert("RGB"), dtype=float) / 255, light) for row in rows]
    labels = [icons[row]["label"] // every for row in rows]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names[::every])})
    return HFDataset.from_dict({"image": images, "label": labels}, features=features)


def _inked(icon: Image.Image, ink: tuple[float, float, float], light: Sequence[float]) -> Image.Image:
    """A grey icon redrawn: ink where it is dark, on a ground that contrasts with the ink."""
    shade = np.asarray(icon.convert("L"), dtype=float)[..., None] / 255
    ground = 1.0 if np.mean(ink) < 0.55 else 0.05
    return _lit(shade * ground + (1 - shade) * np.array(ink), light)


def _lit(pixels: np.ndarray, light: Sequence[float]) -> Image.Image:
    """Pixels in [0, 1] as an image under some light."""
    return Image.fromarray((255 * pixels * np.array(light)).round().astype(np.uint8))
