"""Students, teachers and images of the PromptKD tests."""

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_vlm import PromptKDConfig, PromptKDObjective
from peft_vlm.data import TrainTransform
from peft_vlm.data.dataset import ImageClassificationDataset
from tests.cases import TEACHER_DIM, base_model, class_prompts, images, pixels
from tests.tiny import clip_processor, colour_names, tiny_clip

NAMES = list(colour_names())


def fresh(**settings) -> PeftModel:
    """A student with fixed initial values and without class vectors."""
    torch.manual_seed(0)
    config = PromptKDConfig(**({"class_dim": TEACHER_DIM, "vision_depth": 2, "num_vision_tokens": 2} | settings))
    return get_peft_model(base_model(), config)


def teacher(seed: int = 5, **settings) -> nn.Module:
    """A random teacher with wider class vectors."""
    return tiny_clip(seed=seed, **({"dim": TEACHER_DIM} | settings))


def student(**settings) -> PeftModel:
    """A student with the class vectors of `teacher()`, in evaluation mode."""
    model = fresh(**settings)
    PromptKDObjective(class_prompts(), teacher=teacher()).prepare(model, images())
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, count: int = 4) -> Tensor:
    """The student's own answer, which takes no text."""
    return model(pixel_values=pixels(count)).logits_per_image


def augmented(per_class: int = 4) -> ImageClassificationDataset:
    """Images under random crops."""
    return images(per_class).with_transform(TrainTransform(clip_processor()))
