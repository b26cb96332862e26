"""Further models that a prompt is trained on at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of, remove_prompts
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.errors import DataError
from peft_vlm.methods.tvp.frozen import recomputes
from peft_vlm.methods.tvp.sharing import share_prompt
from peft_vlm.models.towers import unwrap


@dataclass(frozen=True)
class Source:
    """A multimodal model beside the one the trainer is given.

    Args:
        model: The model, without adapters; a pixel prompt of an earlier run is taken off it. It is frozen and wrapped
            when training begins.
        dataset: The training images in the same order, with the collator of this model.
        processor: Its processor, for mean and standard deviation; by default what is stored beside the model.
    """

    model: nn.Module
    dataset: ImageQuestionDataset
    processor: Any = None


def check_same_images(sources: Sequence[Source], dataset: Any) -> None:
    """Refuse sources whose datasets cannot hold the same images.

    Args:
        sources: Further models with their datasets.
        dataset: The training images.

    Raises:
        DataError: If a dataset has another length, other labels or other class names.
    """
    for number, source in enumerate(sources):
        other = source.dataset
        if list(other.labels) != list(dataset.labels) or tuple(other.class_names) != tuple(dataset.class_names):
            raise DataError(
                f"Expected the images of the training dataset in the dataset of source {number}, got "
                f"{len(other)} images of {len(other.class_names)} classes for {len(dataset)} of "
                f"{len(dataset.class_names)}, or other labels. Make it with `dataset.with_collator(collator)`."
            )


def share_once(shared: PeftModel | None, source: PeftModel, model: nn.Module, *, processor: Any) -> PeftModel:
    """The other model with the source's prompt; as it is, when it has this prompt already.

    It recomputes its activations if the source does: the trainer switches that on for its own model alone.

    Args:
        shared: What an earlier call gave, None at first.
        source: `PeftModel` with an active TVP adapter.
        model: The other model.
        processor: Its processor.
    """
    layer = prompt_layer_of(source)
    name = active_name(layer)
    if shared is not None and name in prompt_layer_of(shared).prompts:
        if prompt_layer_of(shared).prompts[name] is layer.prompts[name]:
            return shared
    remove_prompts(model)
    if any(map(recomputes, source.modules())):
        unwrap(model).activation_checkpointing_enable()
    return share_prompt(source, model, processor=processor)
