"""Datasets, few-shot and base/new splits, transforms."""

from peft_vlm.data.dataset import ImageClassificationDataset, LabelDataset, collate
from peft_vlm.data.images import read_image
from peft_vlm.data.transforms import EvalTransform, ImageTransform, TrainTransform

__all__ = [
    "EvalTransform",
    "ImageClassificationDataset",
    "ImageTransform",
    "LabelDataset",
    "TrainTransform",
    "collate",
    "read_image",
]
