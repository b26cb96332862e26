"""Reads tensors out of a checkpoint file without running anything that is in it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_vlm.errors import AdapterError

WRAPPING_KEY = "state_dict"
"""Where Dassl and many others keep the tensors inside a checkpoint."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU.

    Args:
        path: A `.safetensors` file, or a file that `torch.save` wrote: a mapping of tensors, or a mapping that holds
            one under `state_dict`. Pickled files are read with `weights_only=True`.

    Raises:
        AdapterError: If there is no such file, it is damaged, holds other objects than tensors and plain values, or no
            tensor at all.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"Expected a checkpoint file, got {str(path)!r}, which does not exist or is a folder.")
    content = _content(path)
    if isinstance(content, dict) and isinstance(content.get(WRAPPING_KEY), dict):
        content = content[WRAPPING_KEY]
    tensors = (
        {key: value for key, value in content.items() if torch.is_tensor(value)} if isinstance(content, dict) else {}
    )
    if not tensors:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise AdapterError(f"Expected a mapping of names to tensors in {str(path)!r}, got {keys!r}.")
    return tensors


def _content(path: Path) -> Any:
    """Whatever the file holds."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise AdapterError(
            f"Expected a complete checkpoint, got {str(path)!r} with {path.stat().st_size} bytes, which cannot be "
            f"read ({error}). Copy or download it again."
        ) from error
    except (
        Exception
    ) as error:  # torch.load refuses what is not a tensor by an error of the module that it must not use
        raise AdapterError(
            f"Expected tensors and plain values in {str(path)!r}, got other objects, which are not loaded because "
            f"they could run code: {str(error).splitlines()[0]} Where you trust the file, save its tensors as "
            "safetensors."
        ) from error
