"""OpenAI's and open_clip's CLIP under Hugging Face names, and as a folder that `CLIPModel.from_pretrained` loads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from peft_vlm.conversion.official_file import OfficialFile
from peft_vlm.errors import AdapterError, PeftVLMError, UnsupportedModelError, shown
from peft_vlm.files import new_folder, read_json

WHOLE_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
LAYER_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = ("text_projection", "visual.proj")
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
"""Entries of state dicts that only repeat the shapes, or the causal mask."""

HEAD_WIDTH = 64
"""Width of an attention head in every CLIP of OpenAI, and in most of open_clip."""

_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_OPEN_CLIP_TEXT = tuple(
    f"text.{name}"
    for name in ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
)


def is_clip(names: Mapping[str, Any]) -> bool:
    """True for the state dict of a complete CLIP under the names of OpenAI or open_clip.

    Args:
        names: State dict.
    """
    return "visual.proj" in names and ("token_embedding.weight" in names or "text.token_embedding.weight" in names)


def to_hf_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `CLIPModel`.

    Args:
        tensors: Any part of a state dict with OpenAI's names; those of open_clip's text tower may begin with `text.`.

    Raises:
        AdapterError: If a name is none of a CLIP with a vision transformer.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("text.") if name.startswith(_OPEN_CLIP_TEXT) else name
        if plain in WHOLE_NAMES:
            renamed[WHOLE_NAMES[plain]] = tensor.T.contiguous() if plain in TRANSPOSED else tensor
            continue
        layer = _LAYER.fullmatch(plain)
        target = layer and _layer_names(layer)
        if not target:
            raise AdapterError(
                f"Expected tensors of a CLIP with a vision transformer, got {name!r} of shape {tuple(tensor.shape)}, "
                "which that architecture does not have."
            )
        renamed |= zip(target, tensor.chunk(len(target)), strict=True)
    return renamed


def _layer_names(layer: re.Match[str]) -> list[str]:
    """Hugging Face names for one tensor of a layer; none for an unknown part."""
    visual, index, part, kind = layer.groups()
    path = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}."
    if part == "attn.in_proj":
        return [f"{path}self_attn.{name}.{kind}" for name in ATTENTION_INPUTS]
    return [f"{path}{LAYER_PARTS[part]}.{kind}"] if part in LAYER_PARTS else []


def to_openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `CLIPModel` under OpenAI's names; the inverse of `to_hf_names`.

    Args:
        tensors: State dict of a `CLIPModel`, or of complete layers of it.
    """
    whole = {hf: openai for openai, hf in WHOLE_NAMES.items()}
    parts = {hf: openai for openai, hf in LAYER_PARTS.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in whole:
            openai = whole[name]
            renamed[openai] = tensor.T.contiguous() if openai in TRANSPOSED else tensor
            continue
        tower, _, _, index, part = name.split(".", 4)
        path = f"{'visual.' if tower == 'vision_model' else ''}transformer.resblocks.{index}."
        part, _, kind = part.rpartition(".")
        if part in parts:
            renamed[f"{path}{parts[part]}.{kind}"] = tensor
        elif part == "self_attn.q_proj":
            stack = [tensors[name.replace("q_proj", other)] for other in ATTENTION_INPUTS]
            renamed[f"{path}attn.in_proj_{kind}"] = torch.cat(stack)
    return renamed


def _clip_config(
    tensors: Mapping[str, Tensor],
    *,
    hidden_act: str,
    vision_head_width: int = HEAD_WIDTH,
    text_heads: int | None = None,
) -> CLIPConfig:
    """Configuration of the `CLIPModel` that a state dict belongs to.

    Args:
        tensors: Whole state dict with OpenAI's or open_clip's names.
        hidden_act: `"quick_gelu"` for OpenAI's weights and open_clip's `-quickgelu` models, `"gelu"` for the others.
        vision_head_width: Width of an attention head in the vision tower.
        text_heads: Attention heads of the text tower; None: of width 64.
    """
    _check_clip(tensors)
    hf = to_hf_names({name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS})
    patch, positions = (hf[f"vision_model.embeddings.{n}_embedding.weight"] for n in ("patch", "position"))
    vocabulary, text_width = hf["text_model.embeddings.token_embedding.weight"].shape
    towers = {
        tower: {
            "hidden_size": width,
            "intermediate_size": len(hf[f"{tower}_model.encoder.layers.0.mlp.fc1.bias"]),
            "num_hidden_layers": sum(name.endswith("layer_norm1.bias") for name in hf if name.startswith(tower)),
            "num_attention_heads": heads,
            "hidden_act": hidden_act,
            "projection_dim": len(hf["visual_projection.weight"]),
        }
        for tower, width, heads in (
            ("text", text_width, text_heads or text_width // HEAD_WIDTH),
            ("vision", len(patch), len(patch) // vision_head_width),
        )
    }
    towers["text"] |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": len(hf["text_model.embeddings.position_embedding.weight"]),
        # the start and end token are the last two of the vocabulary; the padding after the end is never seen
        **{"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1},
    }
    size = patch.shape[-1] * round((len(positions) - 1) ** 0.5)
    towers["vision"] |= {"patch_size": patch.shape[-1], "image_size": size}
    return CLIPConfig(
        text_config=towers["text"], vision_config=towers["vision"], projection_dim=len(hf["visual_projection.weight"])
    )


def _check_clip(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a model other than a CLIP with two transformers."""
    refuse_other_models(tensors)
    if not is_clip(tensors):
        raise UnsupportedModelError(
            "Expected the state dict of a CLIP with the names of OpenAI or open_clip ('visual.proj', "
            f"'token_embedding.weight', ...), got {sorted(tensors)[:4]!r}."
        )


def refuse_other_models(tensors: Mapping[str, Tensor]) -> None:
    """Refuse models of OpenAI and open_clip that are no CLIP with two transformers, by name.

    Args:
        tensors: Whole state dict.

    Raises:
        UnsupportedModelError: Naming the kind.
    """
    known = {
        "visual.layer1.0.conv1.weight": "a CLIP with a ResNet (RN50 and relatives), which transformers does not have",
        "visual.trunk.patch_embed.proj.weight": "an open_clip model with a vision tower of timm",
        "text.transformer.embeddings.word_embeddings.weight": "an open_clip model with a text tower of transformers",
        "text.cls_emb": "CoCa, whose text tower reads out a class token",
        "logit_bias": "a SigLIP, which loads as `SiglipModel` from its Hugging Face repository",
        "visual.transformer.resblocks.0.ls_1.gamma": "an open_clip model with scaled layers",
        "visual.attn_pool.query": "an open_clip model with attention pooling",
    }
    for name, kind in known.items():
        if name in tensors:
            raise UnsupportedModelError(f"Expected a CLIP with two transformers, got {kind} (tensor {name!r}).")


OPEN_CLIP_CONFIG = "open_clip_config.json"
"""What open_clip's repositories hold beside the weights."""


def convert_clip(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    hidden_act: str | None = None,
    vision_head_width: int | None = None,
    text_heads: int | None = None,
    tokenizer: str | Path | None = None,
) -> CLIPModel:
    """Write a CLIP as a Hugging Face folder: configuration, float32 weights, image processor, and a tokenizer.

    An `open_clip_config.json` beside the weights answers what the arguments leave open.

    Args:
        source: OpenAI's TorchScript archive (its code is not run) or a state dict of OpenAI's CLIP or open_clip.
        folder: New folder.
        hidden_act: `"quick_gelu"` for OpenAI's weights and open_clip's `-quickgelu` models, `"gelu"` for others of
            open_clip. Known for an archive of OpenAI.
        vision_head_width: Width of the vision tower's attention heads; 64 but for open_clip's largest models.
        text_heads: Attention heads of the text tower; by default of width 64.
        tokenizer: Folder or id with a CLIP tokenizer to put beside the model; the weights file has none.

    Returns:
        The model, in evaluation mode.

    Raises:
        AdapterError: If the activation is not known, or a tensor is missing or misshapen.
    """
    file = OfficialFile.open(source)
    tensors, recorded = file.tensors, _open_clip_settings(file.path.with_name(OPEN_CLIP_CONFIG))
    act = hidden_act or recorded.get("hidden_act") or ("quick_gelu" if "input_resolution" in tensors else None)
    if act not in ("quick_gelu", "gelu"):
        raise AdapterError(
            f"Expected `hidden_act` to be 'quick_gelu' or 'gelu', got {act!r}; a state dict does not say. OpenAI's "
            "weights and open_clip's models with '-quickgelu' in their names have 'quick_gelu', others 'gelu'."
        )
    try:
        config = _clip_config(
            tensors,
            hidden_act=act,
            vision_head_width=vision_head_width or recorded.get("vision_head_width", HEAD_WIDTH),
            text_heads=text_heads or recorded.get("text_heads"),
        )
        model = _clip_of(config, {name: value for name, value in tensors.items() if name not in NOT_WEIGHTS})
    except PeftVLMError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"The tensors of {str(file.path)!r} do not make a complete CLIP: {shown(reason, 400)}. Pass the file of "
            "a whole CLIP."
        ) from error
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": config.vision_config.image_size},
        crop_size={"height": config.vision_config.image_size, "width": config.vision_config.image_size},
        **recorded.get("processor", {}),
    )
    with new_folder(folder) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        if tokenizer is not None:
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(part)
    return model


def _clip_of(config: CLIPConfig, tensors: Mapping[str, Tensor]) -> CLIPModel:
    """A CLIP with weights of a file, whose sizes are compared before memory is asked for."""
    weights = to_hf_names(tensors)
    with torch.device("meta"):
        CLIPModel(config).load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()}, strict=True)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"Expected finite values in {name!r}, got inf or nan. Get the file again.")
    model = CLIPModel(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


def _open_clip_settings(path: Path) -> dict[str, Any]:
    """Activation, heads and pixels in an `open_clip_config.json`; empty without one."""
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        settings = {
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "vision_head_width": model["vision_cfg"].get("head_width", HEAD_WIDTH),
            "text_heads": model["text_cfg"].get("heads"),
        }
        settings["processor"] = {f"image_{key}": pixels[key] for key in ("mean", "std") if key in pixels}
        return settings
    except (LookupError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"Expected the settings of open_clip in {str(path)!r}, got something else ({error!r}). Get it again."
        ) from error
