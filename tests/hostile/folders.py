"""Sound adapters on a tiny base model, for attacks that change one thing of them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_vlm.files import CONFIG_NAME, WEIGHTS_NAME
from tests.cases import ADAPTER_CASES, base_model
from tests.tiny import clip_processor, colour_names, tiny_clip, tiny_tokenizer


def write_base(folder: Path) -> Path:
    """The tiny CLIP with tokenizer and image processor."""
    tiny_clip().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return folder


def write_adapters(base: Path, folder: Path) -> Path:
    """An adapter of each type, and a LoRA, in folders of their names."""
    for case in ADAPTER_CASES:
        torch.manual_seed(0)
        recorded = {"class_names": list(colour_names(6)), "template": "a {}.", "image_size": [16, 16]}
        save(get_peft_model(base_model(), case.config(**recorded)), base, folder / case.adapter)
    save(get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], r=2)), base, folder / "lora")
    return folder


def save(model: Any, base: Path, folder: Path) -> None:
    """Save an adapter that records a base model."""
    model.save_pretrained(folder)
    change(base_model_name_or_path=str(base))(folder)


def change(**values: Any) -> Callable[[Path], None]:
    """Overwrite values of the configuration file."""

    def make(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return make


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content) and None


def linked(name: str, target: str) -> Callable[[Path], None]:
    """Replace a file by a link; `{}` in the target is the folder's parent."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.format(folder.parent))

    return make


def piped(name: str) -> Callable[[Path], None]:
    """Replace a file by a named pipe, which blocks whoever opens it."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def without(name: str) -> Callable[[Path], None]:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of the weights file."""

    def make(folder: Path) -> None:
        loaded = load_file(folder / WEIGHTS_NAME)
        edit(loaded)
        save_file(loaded, folder / WEIGHTS_NAME)

    return make


def each(convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change every tensor."""
    return tensors(lambda loaded: loaded.update({name: convert(tensor) for name, tensor in loaded.items()}))


def both(*makers: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make several changes."""
    return lambda folder: [make(folder) for make in makers] and None
