"""Datasets, few-shot and base/new splits, transforms."""

from peft_vlm.data.benchmarks import (
    BENCHMARKS,
    SKIP_TUNING_TEMPLATES,
    Benchmark,
    load_benchmark,
)
from peft_vlm.data.class_names import read_class_list, read_class_names
from peft_vlm.data.dataset import ImageClassificationDataset, LabelDataset, collate
from peft_vlm.data.images import read_image
from peft_vlm.data.loading import load_image_dataset, load_unlabelled_images
from peft_vlm.data.question_collator import QuestionCollator, check_image_tokens, model_inputs, question_inputs
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.data.splits import (
    BaseToNewSplit,
    base_and_new_classes,
    base_to_new_split,
    few_shot,
    few_shot_indices,
    read_zhou_split,
)
from peft_vlm.data.streaming import ImageStream, balanced_shares, load_image_stream, open_stream
from peft_vlm.data.transforms import EvalTransform, ImageAugmentation, ImageTransform, RandomCrop, TrainTransform

__all__ = [
    "BENCHMARKS",
    "SKIP_TUNING_TEMPLATES",
    "BaseToNewSplit",
    "Benchmark",
    "EvalTransform",
    "ImageAugmentation",
    "ImageClassificationDataset",
    "ImageQuestionDataset",
    "ImageStream",
    "ImageTransform",
    "LabelDataset",
    "QuestionCollator",
    "RandomCrop",
    "TrainTransform",
    "balanced_shares",
    "base_and_new_classes",
    "base_to_new_split",
    "check_image_tokens",
    "collate",
    "few_shot",
    "few_shot_indices",
    "load_benchmark",
    "load_image_dataset",
    "load_image_stream",
    "load_unlabelled_images",
    "model_inputs",
    "open_stream",
    "question_inputs",
    "read_class_list",
    "read_class_names",
    "read_image",
    "read_zhou_split",
]
