"""The three bundled multimodal language models as plain Hugging Face models, with their processors.

Their vision towers start from the bundled student CLIP. Idefics3 and PaliGemma have SigLIP's tower, which has neither
a class token nor a norm before its first layer: that norm is folded into the patch embedding with its mean scale over
drawings, and training does the rest.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessor,
)

from clip_model import IMAGE_MEAN, IMAGE_STD

STUDENT = Path(__file__).resolve().parent.parent / "clip_student"
VOCABULARY_SIZE = 3000
PATCH_SIZE = 8
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
# input size in pixels; (width, layers, heads, width of the feed-forward part) of the language model
SIZES = {
    "llava": (48, (256, 4, 4, 704)),
    "idefics3": (64, (224, 5, 7, 608)),
    "paligemma": (56, (192, 6, 6, 512)),
    "tiny": (48, (64, 1, 2, 128)),
}
NORMALISATION = {
    "llava": (list(IMAGE_MEAN), list(IMAGE_STD)),
    "idefics3": ([0.5] * 3, [0.5] * 3),
    "paligemma": ([0.5] * 3, [0.5] * 3),
}
SPECIAL_TOKENS = {
    "llava": ["<image>"],
    "idefics3": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    "paligemma": ["<image>"],
}
_CHAT = {
    "llava": (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% else %} ASSISTANT:{% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "idefics3": (
        "{% for m in messages %}{% if m['role'] == 'user' %}User:{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>"
        "{% else %}\nAssistant:{% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\nAssistant:{% endif %}"
    ),
}


def train_tokenizer(texts: list[str], family: str) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of `VOCABULARY_SIZE` tokens; a word is the same token at the start of a text and inside."""
    special = ["<s>", "</s>", "<pad>", "<unk>", *SPECIAL_TOKENS[family]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    named = {"image_token": "<image>"}
    if family == "idefics3":
        named |= {"fake_image_token": "<fake_token_around_image>", "end_of_utterance_token": "<end_of_utterance>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named,
        padding_side="left",
    )


def build_processor(family: str, tokenizer: PreTrainedTokenizerFast, size: int) -> ProcessorMixin:
    """Processor of a family for square images of `size` pixels."""
    mean, std = NORMALISATION[family]
    shared: dict[str, Any] = {"image_mean": mean, "image_std": std, "resample": 3, "do_convert_rgb": True}
    square = {"height": size, "width": size}
    patches = (size // PATCH_SIZE) ** 2
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessor(size=square, crop_size=square, **shared),
            tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=_CHAT[family],
        )
    if family == "idefics3":
        edge = {"longest_edge": size}
        images = Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False, **shared)
        return Idefics3Processor(images, tokenizer, image_seq_len=patches // 4, chat_template=_CHAT[family])
    images = SiglipImageProcessor(size=square, **shared)
    images.image_seq_length = patches
    return PaliGemmaProcessor(images, tokenizer)


def _language_config(family: str, shape: tuple[int, int, int, int], tokenizer: PreTrainedTokenizerFast) -> dict:
    """Settings of the language model, Llama or Gemma."""
    width, layers, heads, inner = shape
    config = {
        "model_type": "gemma" if family == "paligemma" else "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }
    return config | {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_model(family: str, tokenizer: PreTrainedTokenizerFast, *, shape: str | None = None) -> PreTrainedModel:
    """Model of a family: random language model and projector, vision tower from the student CLIP."""
    size, language = SIZES[shape or family]
    language = _language_config(family, language, tokenizer)
    vision = VISION | {"image_size": size, "patch_size": PATCH_SIZE, "hidden_act": "quick_gelu"}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
    config: Any
    if family == "llava":
        config = LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **vision},
            text_config=language,
            image_token_id=image_token,
            vision_feature_layer=-1,
            image_seq_length=(size // PATCH_SIZE) ** 2,
            **ends,
        )
        model: PreTrainedModel = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    elif family == "idefics3":
        config = Idefics3Config(
            vision_config=vision, text_config=language, image_token_id=image_token, scale_factor=2, **ends
        )
        model = Idefics3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    else:
        config = PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
            text_config=language,
            image_token_index=image_token,
            projection_dim=language["hidden_size"],
            **ends,
        )
        model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: PreTrainedModel) -> None:
    """Initial values fit for small widths, and the student's vision tower."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim == 2 and "vision" not in name and "embedding" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    student = CLIPModel.from_pretrained(STUDENT, dtype=torch.float32).vision_model
    tower = vision_tower(model)
    source = student.state_dict()
    layers = {key: value for key, value in source.items() if key.startswith("encoder.layers.")}
    if "pre_layrnorm.weight" in tower.state_dict():
        tower.load_state_dict(source)
        return
    layers |= {key: value for key, value in source.items() if key.startswith("post_layernorm.")}
    scale = source["pre_layrnorm.weight"] / _embedding_spread(student)
    embeddings = tower.embeddings
    patches = source["embeddings.patch_embedding.weight"]
    embeddings.patch_embedding.weight.copy_((patches - patches.mean(dim=0)) * scale[:, None, None, None])
    positions = source["embeddings.position_embedding.weight"][1:]
    positions = (positions - positions.mean(dim=1, keepdim=True)) * scale + source["pre_layrnorm.bias"]
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.copy_(
        _resized_positions(positions, len(embeddings.position_embedding.weight))
    )
    tower.load_state_dict(tower.state_dict() | layers)


def _embedding_spread(student: Any) -> Tensor:
    """Mean standard deviation over the width of what enters the student's first norm, for random drawings."""
    blobs = F.interpolate(torch.rand(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=48)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return student.embeddings((blobs.round() - mean) / std).std(dim=-1).mean()


def _resized_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings of a square grid, resized to `count` patches."""
    old, new = math.isqrt(len(positions)), math.isqrt(count)
    grid = positions.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(positions.shape[1], count).T


def vision_tower(model: PreTrainedModel) -> Any:
    """The vision model inside a bundled multimodal model, where its `embeddings` and `encoder` are."""
    inner: Any = model.model
    tower = inner.vision_model if hasattr(inner, "vision_model") else inner.vision_tower
    return getattr(tower, "vision_model", tower)


def prompt_text(processor: ProcessorMixin) -> Callable[[str], str]:
    """Turns a question into the text that the processor takes, up to where the answer begins."""
    if processor.chat_template is None:
        return lambda question: f"<image>{question}"

    def ask(question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    return ask
