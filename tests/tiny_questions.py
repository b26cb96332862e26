"""Images with questions about them, for the tiny LLaVA of `tests.tiny_mllm` with a whole processor."""

from typing import Any

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from peft_vlm.data import ImageQuestionDataset, QuestionCollator
from tests.tiny import clip_processor, colour_names, colour_rows
from tests.tiny_mllm import IMAGE_TOKEN, mllm_tokenizer, tiny_mllm

QUESTION = "What colour?"
NUM_IMAGE_TOKENS = 16


def llava_processor(*, size: int = 32, patch_size: int = 8) -> LlavaProcessor:
    """Pixels of 32 x 32 and 16 image tokens, without chat template."""
    return LlavaProcessor(
        image_processor=clip_processor(size),
        tokenizer=mllm_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )


def tiny_llava(*, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model that the processor belongs to."""
    model = tiny_mllm("llava", seed=seed).model
    assert isinstance(model, LlavaForConditionalGeneration)
    return model


def colour_questions(per_class: int = 2, **options: Any) -> ImageQuestionDataset:
    """Six colours and one question, with a collator for the tiny LLaVA."""
    options = {"question": QUESTION, "collator": QuestionCollator(llava_processor())} | options
    return ImageQuestionDataset(colour_rows(per_class), colour_names(), label_column="label", **options)
