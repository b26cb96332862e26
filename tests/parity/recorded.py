"""Reads the tensors recorded from the official codes (see reference/README.md)."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from peft_vlm.data.dataset import ImageClassificationDataset

FOLDER = Path(__file__).parent / "reference"


def tensors(name: str) -> dict[str, Tensor]:
    """Tensors of a case."""
    return load_file(FOLDER / f"{name}.safetensors")


def facts(name: str) -> dict[str, Any]:
    """Description of a case."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def recorded_clip(name: str) -> CLIPModel:
    """The tiny CLIP a case was recorded on."""
    config = {key: value for key, value in facts(name)["hf_config"].items() if key != "transformers_version"}
    model = CLIPModel(CLIPConfig.from_dict(config))
    model.load_state_dict(tensors(name), strict=True)
    return model.eval()


class RecordedImages(ImageClassificationDataset):
    """A dataset whose pixel values are given tensors, so that no image processing stands between us and the record."""

    def __init__(self, pixel_values: Tensor, labels: Tensor, num_classes: int) -> None:
        rows = [{"image": Image.new("RGB", (1, 1)), "label": int(label)} for label in labels]
        super().__init__(rows, [f"class {index}" for index in range(num_classes)])
        self.pixel_values = pixel_values

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index], "index": index}


def batch_of(dataset: RecordedImages, indices: list[int]) -> dict[str, Tensor]:
    """A batch of given positions, without pixels."""
    return {"index": torch.tensor(indices), "labels": torch.tensor([dataset.labels[i] for i in indices])}
