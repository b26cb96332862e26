"""One row per method: how to build it on a tiny model. The contract tests run every promise on every row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import CLIPProcessor

from peft_vlm import SkipTuningConfig, SkipTuningObjective
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.objective import Objective
from peft_vlm.text.prompts import ClassPrompts, tokenize_classes
from tests.tiny import CONTEXT_LENGTH, clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer

NUM_CLASSES = 6


@dataclass(frozen=True)
class Case:
    """A method as the contract tests see it.

    Args:
        method: Registered name.
        config: Builds its configuration for the tiny model.
        objective: Builds its objective for class prompts; keyword arguments override settings.
        other_shape: Settings of a second adapter with another shape, None if every adapter looks the same.
        can_merge: Whether merging into the base weights is exact.
        zero_gradients: Endings of trainable tensors whose gradient is analytically zero, with the reason.
        batch_dependent: Why the loss of a batch is not the mean of the losses of its halves; empty if it is.
        bad_settings: Impossible configurations: (settings, text that the message must hold).
    """

    method: str
    config: Callable[..., PeftConfig]
    objective: Callable[..., Objective]
    other_shape: dict[str, Any] | None = None
    can_merge: bool = False
    zero_gradients: dict[str, str] = field(default_factory=dict)
    batch_dependent: str = ""
    bad_settings: Sequence[tuple[dict[str, Any], str]] = ()


def skip_tuning_config(**settings: Any) -> SkipTuningConfig:
    """Upper two of three layers."""
    return SkipTuningConfig(**({"start_layer": 1} | settings))


def skip_tuning_objective(prompts: ClassPrompts, **settings: Any) -> SkipTuningObjective:
    """Random batches, so that a batch has several classes."""
    return SkipTuningObjective(prompts, **({"batch_composition": "random", "top_ratio": 0.5} | settings))


CASES = [
    Case(
        method="skip_tuning",
        config=skip_tuning_config,
        objective=skip_tuning_objective,
        other_shape={"start_layer": 2},
        can_merge=True,
        zero_gradients={"k_proj.skip_tuning_bias": "softmax does not change when all keys shift alike"},
        batch_dependent="CSkip chooses the classes by the whole batch",
        bad_settings=(
            ({"start_layer": -1}, "0 or more, got -1"),
            ({"start_layer": 3}, "from 0 to 2"),
            ({"start_layer": 1.5}, "integer, got 1.5"),
            ({"text_start_layer": 7}, "`text_start_layer` from 0 to 2"),
            ({"adapter_dtype": "int8"}, "got 'int8'"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
]


def class_prompts(names: Sequence[str] | None = None) -> ClassPrompts:
    """Prompts of the colour classes."""
    names = names or colour_names(NUM_CLASSES)
    return tokenize_classes(tiny_tokenizer(), names, template="a {}.", max_length=CONTEXT_LENGTH)


def images(per_class: int = 4, *, seed: int = 0) -> ImageClassificationDataset:
    """Colour images with a deterministic transform."""
    rows = colour_rows(per_class, classes=NUM_CLASSES, seed=seed)
    return ImageClassificationDataset(rows, colour_names(NUM_CLASSES), transform=EvalTransform(clip_processor()))


def prepared(case: Case, model: nn.Module, dataset: ImageClassificationDataset, **settings: Any) -> Objective:
    """The method's objective, ready for batches of the dataset."""
    objective = case.objective(class_prompts(), **settings)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    return objective


def perturb(model: nn.Module) -> None:
    """Move every trainable tensor a little, so that an adapter acts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def base_model(**settings: Any) -> nn.Module:
    """The tiny CLIP of every case."""
    return tiny_clip(**settings)


def processor() -> CLIPProcessor:
    """Tokenizer and image processor of the tiny CLIP."""
    return CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer())
