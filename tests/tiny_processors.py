"""Whole processors for the tiny models of `tests.tiny_mllm`, those that need no video processor."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from tests.tiny_mllm import IMAGE_TOKEN, mllm_tokenizer, tiny_mllm


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with the names that Gemma 3's processor looks for."""
    tokenizer = mllm_tokenizer()
    names = {"image_token": IMAGE_TOKEN, "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


LLAVA = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}

#: Architecture -> class of the processor, its tokenizer, its settings.
PROCESSORS: dict[str, tuple[str, Callable[[], PreTrainedTokenizerFast], dict[str, Any]]] = {
    "llava": ("LlavaProcessor", mllm_tokenizer, LLAVA),
    "llava_next": ("LlavaNextProcessor", mllm_tokenizer, LLAVA),
    "blip_2": ("Blip2Processor", mllm_tokenizer, {"num_query_tokens": 4}),
    "instructblip": ("InstructBlipProcessor", mllm_tokenizer, {"num_query_tokens": 4}),
    "paligemma": ("PaliGemmaProcessor", mllm_tokenizer, {}),
    "gemma3": ("Gemma3Processor", gemma_tokenizer, {"image_seq_length": 4}),
    "idefics3": ("Idefics3Processor", mllm_tokenizer, {"image_seq_len": 4}),
}


def tiny_processor(name: str) -> Any:
    """The processor of an architecture, without chat template.

    Args:
        name: Key of `PROCESSORS`.
    """
    class_name, tokenizer, settings = PROCESSORS[name]
    image_processor = tiny_mllm(name).image_processor
    if name == "paligemma":
        image_processor.image_seq_length = 25
    parts: dict[str, Any] = {"image_processor": image_processor, "tokenizer": tokenizer()}
    if name == "instructblip":
        parts["qformer_tokenizer"] = mllm_tokenizer()
    return getattr(transformers, class_name)(**parts, **settings)
