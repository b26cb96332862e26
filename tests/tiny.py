"""Tiny random models, a byte-level tokenizer, processors and generated images: what a test needs, in milliseconds.

Nothing here touches the network or reads a file. Models are seeded and have random norms and biases, so that a
forgotten one shows in the output.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

IMAGE_SIZE = 16
CONTEXT_LENGTH = 40
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token per byte: 512 symbols, start and end of text (514 ids)."""
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def tiny_clip(*, seed: int = 0, layers: int = 3, dim: int = 16, eos_token_id: int = 513) -> CLIPModel:
    """A CLIP of two 32-wide towers: 16 px, patch 8 (4 patches), 40 tokens, `dim` shared dimensions."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = {"vocab_size": 514, "max_position_embeddings": CONTEXT_LENGTH, "bos_token_id": 512}
    text |= {"eos_token_id": eos_token_id, "pad_token_id": 513}
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=dim)
    return _randomised(CLIPModel(config), seed)


def tiny_siglip(*, seed: int = 0, layers: int = 2) -> SiglipModel:
    """A SigLIP of two 32-wide towers: 16 px, patch 8, 24 tokens, the tokenizer of `tiny_tokenizer`."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = {"vocab_size": 514, "max_position_embeddings": 24, "projection_size": 32}
    text |= {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8}
    return _randomised(SiglipModel(SiglipConfig(text_config=tower | text, vision_config=tower | vision)), seed)


def _randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0 or name in ("logit_scale", "logit_bias"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    return model.eval()


def clip_processor(size: int = IMAGE_SIZE) -> CLIPImageProcessor:
    """CLIP's image processor at a small size: shortest edge, centre crop, OpenAI's mean and std."""
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def siglip_processor(size: int = IMAGE_SIZE) -> SiglipImageProcessor:
    """SigLIP's image processor at a small size: the image is squeezed to a square, mean and std 0.5."""
    return SiglipImageProcessor(size={"height": size, "width": size})


def noise_image(width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of random pixels in PIL mode `L`, `LA`, `P`, `RGB`, `RGBA`, `CMYK`, `I;16` or `1`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels, "RGBA") if mode in ("RGBA", "LA") else Image.fromarray(pixels[..., :3])
    return image.convert(mode)


def colour_rows(per_class: int, *, classes: int = len(COLOURS), size: int = 20, seed: int = 0) -> list[dict]:
    """Rows {"image", "label"} of noisy one-colour images, class by class."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in range(classes):
        base = 255 * np.array(colorsys.hsv_to_rgb(label / len(COLOURS), 0.8, 0.9))
        for _ in range(per_class):
            pixels = np.clip(base + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
            rows.append({"image": Image.fromarray(pixels), "label": label})
    return rows


def colour_names(classes: int = len(COLOURS)) -> Sequence[str]:
    """Class names of `colour_rows`."""
    return COLOURS[:classes]
