"""A prompted tiny LLaVA, questions about colours for it, a second model, and a CLIP."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_vlm import TVPConfig
from peft_vlm.data import ImageQuestionDataset, QuestionCollator
from peft_vlm.methods.tvp import ClipGuide, TVPObjective, prompt_layer_of
from peft_vlm.text import Candidates, tokenize_candidates
from tests.cases import class_prompts
from tests.tiny import clip_processor, colour_names, tiny_clip
from tests.tiny_mllm import mllm_tokenizer
from tests.tiny_questions import colour_questions, llava_processor, tiny_llava

CANVAS, BORDER = 32, 5


def prompt_parameter(model: nn.Module) -> nn.Parameter:
    """The tensor that is trained."""
    return prompt_layer_of(model).prompts["default"]


def prompted_llava(*, size: float = 0.3, model: PreTrainedModel | None = None, **settings: Any) -> PeftModel:
    """The tiny LLaVA with a random prompt, which shrinks 32 px images into 22 px."""
    own = {"canvas_size": CANVAS, "border": BORDER} | settings
    adapted = get_peft_model(model or tiny_llava(), TVPConfig.for_processor(clip_processor(), **own))
    with torch.no_grad():
        noise = torch.randn(3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(5))
        prompt_parameter(adapted).copy_(size * noise * prompt_layer_of(adapted).settings["default"].mask())
    return adapted.eval()


def candidates() -> Candidates:
    """The colours as the collators write them, ended by the end token ("red" begins no other colour, but may)."""
    return tokenize_candidates(mllm_tokenizer(), colour_names(), include_end=True)


def guide(**settings: Any) -> ClipGuide:
    """A CLIP of 16 px, with its own images."""
    return ClipGuide(tiny_clip(seed=7), class_prompts(), **({"processor": clip_processor(16)} | settings))


def questions(per_class: int = 1, **options: Any) -> ImageQuestionDataset:
    """Colours for LLaVA and the CLIP."""
    collator = QuestionCollator(llava_processor(), clip_processor=clip_processor(16))
    return colour_questions(per_class, **({"collator": collator} | options))


def objective(**settings: Any) -> TVPObjective:
    """Weights that let every term count."""
    weights = {"fca_weight": 0.05, "tse_weight": 0.1, "tse_clip": guide()}
    return TVPObjective(candidates(), **(weights | settings))


def prepared(model: PeftModel, dataset: ImageQuestionDataset, **settings: Any) -> TVPObjective:
    """The objective, ready for batches of the dataset."""
    target = objective(**settings)
    target.prepare(model, dataset)
    target.epoch_start(model, dataset, 0)
    return target


def batch(dataset: ImageQuestionDataset, positions: range | list[int] = range(6)) -> dict[str, Tensor]:
    """A batch of some positions."""
    return dataset.collate([dataset[i] for i in positions])


def gradient(model: PeftModel, target: TVPObjective, columns: dict[str, Tensor]) -> Tensor:
    """Of the loss of a batch."""
    prompt_parameter(model).grad = None
    target(model.train(), columns).loss.backward()
    return prompt_parameter(model).grad.clone()


def second_model() -> PreTrainedModel:
    """A LLaVA of other weights."""
    return tiny_llava(seed=3)
