"""Write weights of OpenAI and open_clip as a folder that `CLIPModel.from_pretrained` and the image processor load."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from peft_vlm.conversion.clip_names import HEAD_WIDTH, NOT_WEIGHTS, clip_config, to_hf_names
from peft_vlm.conversion.official_file import OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.files import new_folder

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
    config = clip_config(
        tensors,
        hidden_act=act,
        vision_head_width=vision_head_width or recorded.get("vision_head_width", HEAD_WIDTH),
        text_heads=text_heads or recorded.get("text_heads"),
    )
    model = CLIPModel(config).eval()
    weights = to_hf_names({name: value for name, value in tensors.items() if name not in NOT_WEIGHTS})
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise AdapterError(f"The tensors of {str(file.path)!r} do not make a complete CLIP: {error}") from error
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


def _open_clip_settings(path: Path) -> dict[str, Any]:
    """Activation, heads and pixels in an `open_clip_config.json`; empty without one."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
    settings = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "vision_head_width": model["vision_cfg"].get("head_width", HEAD_WIDTH),
        "text_heads": model["text_cfg"].get("heads"),
    }
    settings["processor"] = {f"image_{key}": pixels[key] for key in ("mean", "std") if key in pixels}
    return settings
