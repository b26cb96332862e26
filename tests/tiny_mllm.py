"""Tiny random multimodal models of 12 architectures, with the image processors and tokenizers they are used with.

    mllm = tiny_mllm("llava")
    inputs = mllm.inputs([image, image], "what is this?")      # what model(**inputs) and model.generate(**inputs) take

Weights are random with a scale that lets the image show in the output, image sizes differ between architectures, and
inputs come out of the architecture's own image processor: tiles, padding and packed patches included. The number of
image tokens is counted from the features the model makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny import _randomised

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = (
    *("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN, "<video>", "<image_end>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<start_of_image>", "<end_of_image>"),
    *(f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)),
)
PAD, BOS, EOS, IMAGE = 256, 257, 258, 260
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

TEXT = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
KEYS_AND_VALUES = {"num_key_value_heads": 2, "max_position_embeddings": 512}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
}


def mllm_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens of all architectures."""
    vocabulary = {symbol: index for index, symbol in enumerate(bytes_to_unicode().values())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@dataclass(frozen=True)
class Architecture:
    """How to build one architecture small.

    Args:
        model: Class in transformers.
        settings: Of its configuration; dictionaries become nested configurations.
        processor: Class of its image processor in transformers.
        processing: Settings of that.
    """

    model: str
    settings: Callable[[], dict[str, Any]]
    processor: str
    processing: dict[str, Any]


def clip_vision(size: int) -> dict[str, Any]:
    """CLIP's vision tower."""
    return VISION | {"model_type": "clip_vision_model", "image_size": size}


def siglip_vision(size: int) -> dict[str, Any]:
    """SigLIP's vision tower."""
    return VISION | {"model_type": "siglip_vision_model", "image_size": size, "vision_use_head": False}


def llama() -> dict[str, Any]:
    """Llama's language model."""
    return TEXT | KEYS_AND_VALUES | {"model_type": "llama"}


def qwen2() -> dict[str, Any]:
    """Qwen2's language model."""
    return TEXT | KEYS_AND_VALUES | {"model_type": "qwen2"}


def opt() -> dict[str, Any]:
    """OPT's language model."""
    own = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
    return {key: value for key, value in TEXT.items() if key != "intermediate_size"} | own | {"dropout": 0.0}


def blip() -> dict[str, Any]:
    """Settings of BLIP-2 and InstructBLIP."""
    qformer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    qformer |= {"encoder_hidden_size": 32, "vocab_size": VOCAB_SIZE}
    parts = {"vision_config": VISION | {"image_size": 24}, "qformer_config": qformer, "text_config": opt()}
    return parts | {"num_query_tokens": 4, "image_token_index": IMAGE}


def square(size: int) -> dict[str, int]:
    """A fixed size, as image processors write it."""
    return {"height": size, "width": size}


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
IDEFICS = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}


def idefics(size: int) -> dict[str, Any]:
    """Settings of Idefics3 and SmolVLM."""
    vision = VISION | {"image_size": size}
    return {"vision_config": vision, "text_config": llama(), "image_token_id": IMAGE, "scale_factor": 2}


def qwen_vl(**vision: Any) -> dict[str, Any]:
    """Settings of Qwen2-VL and Qwen2.5-VL."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tokens = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 6}
    sizes = {"depth": 2, "num_heads": 4, "patch_size": 8}
    return {
        "vision_config": sizes | vision,
        "text_config": TEXT | KEYS_AND_VALUES | {"rope_parameters": rope},
    } | tokens


ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        lambda: {"vision_config": clip_vision(32), "text_config": llama(), "image_token_index": IMAGE},
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": square(32)},
    ),
    "llava_next": Architecture(
        "LlavaNextForConditionalGeneration",
        lambda: {
            "vision_config": clip_vision(32),
            "text_config": llama(),
            "image_token_index": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
        },
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": square(32), "image_grid_pinpoints": PINPOINTS},
    ),
    "llava_onevision": Architecture(
        "LlavaOnevisionForConditionalGeneration",
        lambda: {
            "vision_config": siglip_vision(32),
            "text_config": qwen2(),
            "image_token_index": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
        },
        "LlavaOnevisionImageProcessor",
        {"size": square(32), "image_grid_pinpoints": PINPOINTS},
    ),
    "blip_2": Architecture(
        "Blip2ForConditionalGeneration",
        blip,
        "BlipImageProcessor",
        {"size": square(24)},
    ),
    "instructblip": Architecture(
        "InstructBlipForConditionalGeneration",
        blip,
        "BlipImageProcessor",
        {"size": square(24)},
    ),
    "paligemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        lambda: {
            "vision_config": siglip_vision(40) | {"projection_dim": 32},
            "text_config": TEXT | KEYS_AND_VALUES | {"model_type": "gemma", "head_dim": 8},
            "image_token_index": IMAGE,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        "SiglipImageProcessor",
        {"size": square(40)},
    ),
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        lambda: {
            "vision_config": siglip_vision(32),
            "text_config": TEXT | KEYS_AND_VALUES | {"head_dim": 8, "query_pre_attn_scalar": 8},
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE + 6,
            "eoi_token_index": IMAGE + 7,
            "mm_tokens_per_image": 4,
        },
        "Gemma3ImageProcessor",
        {"size": square(32)},
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration", lambda: idefics(32), "Idefics3ImageProcessor", IDEFICS
    ),
    "smolvlm": Architecture("SmolVLMForConditionalGeneration", lambda: idefics(32), "SmolVLMImageProcessor", IDEFICS),
    "internvl": Architecture(
        "InternVLForConditionalGeneration",
        lambda: {
            "vision_config": VISION | {"image_size": [48, 48], "patch_size": [8, 8], "use_qk_norm": True},
            "text_config": qwen2(),
            "image_token_id": IMAGE,
            "image_seq_length": 9,
        },
        "GotOcr2ImageProcessor",
        {"size": square(48), "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        lambda: qwen_vl(embed_dim=32, hidden_size=32, mlp_ratio=2),
        "Qwen2VLImageProcessor",
        {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 64 * 64},
    ),
    "qwen2_5_vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: (
            qwen_vl(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=32)
            | {"fullatt_block_indexes": [1]}
        ),
        "Qwen2VLImageProcessor",
        {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 64 * 64},
    ),
}


@dataclass(frozen=True)
class TinyMLLM:
    """A tiny model with what makes inputs for it.

    Args:
        name: Key of `ARCHITECTURES`.
        model: The model, in evaluation mode.
        image_processor: Its image processor.
        tokenizer: Its tokenizer.
    """

    name: str
    model: transformers.PreTrainedModel
    image_processor: transformers.BaseImageProcessor
    tokenizer: PreTrainedTokenizerFast

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The columns that the image processor makes and the model takes, one image per row."""
        nested = [[image] for image in images] if self.name in ("idefics3", "smolvlm") else list(images)
        columns = self.image_processor(nested, return_tensors="pt")
        unused = {"num_patches", "num_crops", "rows", "cols", "batch_num_images"}
        return {key: value for key, value in columns.items() if key not in unused}

    def inputs(self, images: Sequence[Image.Image], text: str = "what is this?") -> dict[str, Tensor]:
        """What the model and its `generate` take: as many image tokens as the model makes features, then the text.

        Args:
            images: One image per row; all of one size, so that rows have the same length.
            text: The same question for all.
        """
        pixels = self.pixels(images)
        question = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[BOS, *[IMAGE] * self.num_image_tokens(pixels, len(images)), *question]] * len(images))
        columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels
        if self.name == "instructblip":
            queries = torch.tensor([question] * len(images))
            columns |= {"qformer_input_ids": queries, "qformer_attention_mask": torch.ones_like(queries)}
        if self.name.startswith("qwen2"):
            columns["mm_token_type_ids"] = (ids == IMAGE).int()
        return columns

    @torch.no_grad()
    def num_image_tokens(self, pixels: dict[str, Tensor], count: int) -> int:
        """Image features per row."""
        if "blip" in self.name:
            return self.model.config.num_query_tokens
        features = self.model.get_image_features(**pixels).pooler_output
        rows = sum(len(part.flatten(0, -2)) for part in features)
        assert rows % count == 0
        return rows // count


def tiny_mllm(name: str, *, seed: int = 0) -> TinyMLLM:
    """A tiny random model of one architecture.

    Args:
        name: Key of `ARCHITECTURES`.
        seed: Of the weights.
    """
    architecture = ARCHITECTURES[name]
    model_class = getattr(transformers, architecture.model)
    model = model_class(model_class.config_class(**architecture.settings()))
    processor = getattr(transformers, architecture.processor)(**architecture.processing)
    model.generation_config.eos_token_id = None  # always as many tokens as asked for
    return TinyMLLM(name, _randomised(model, seed), processor, mllm_tokenizer())
