"""Read the tensors of a checkpoint file without running any code in it."""

from collections import defaultdict
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from peft_vlm.errors import AdapterError

WRAPPING_KEY = "state_dict"
"""Where Dassl and many others keep the tensors inside a checkpoint."""

CONTAINERS = {"builtins.dict": dict, "collections.defaultdict": defaultdict}
"""What optimizer states are made of."""

INERT_MODULES = ("torch.optim.", "__torch__.")
"""Classes that are read as empty shells: optimizers and schedulers beside the tensors of a training checkpoint (the
warm-up of Dassl pickles a `CosineAnnealingLR` with its `SGD`), and the modules of a TorchScript archive."""


class Shell:
    """Placeholder for a class of `INERT_MODULES`: holds the state of an object and has no behaviour."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU.

    Args:
        path: A `.safetensors` file, a TorchScript archive (its code is not read), or a file that `torch.save` wrote: a
            mapping of tensors, or a mapping that holds one under `state_dict`. Pickled files are read with
            `weights_only=True`; optimizers and schedulers in them stay empty shells.

    Raises:
        AdapterError: If there is no such file, it is damaged, holds other objects than tensors and plain values, or no
            tensor at all.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"Expected a checkpoint file, got {str(path)!r}, which does not exist or is a folder.")
    content = _content(path)
    if isinstance(content, Shell):
        content = _tensors_of_archive(content)
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
    """The content of the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        source = _without_code(path) if is_zipfile(path) else path
        with _allowed(source) if is_zipfile(path) else nullcontext():
            return torch.load(source, map_location="cpu", weights_only=True)
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


def _without_code(path: Path) -> Path | BytesIO:
    """The file, or, of a TorchScript archive, its tensors and attributes alone, as `torch.save` lays them out."""
    with ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return path
        copy = BytesIO()
        with ZipFile(copy, "w") as kept:
            for entry in archive.infolist():
                folder = entry.filename.partition("/")[2]
                if not folder.startswith(("code/", "constants")):
                    kept.writestr(entry, archive.read(entry))
    copy.seek(0)
    return copy


def _allowed(source: Path | BytesIO) -> safe_globals:
    """The globals of a file that may be read beside those torch allows, for the time of a `with` block."""
    allowed: list[Any] = []
    for name in get_unsafe_globals_in_checkpoint(source):
        module, _, qualified = name.rpartition(".")
        if name in CONTAINERS:
            allowed.append(CONTAINERS[name])
        elif name.startswith(INERT_MODULES):
            allowed.append(type(qualified, (Shell,), {"__module__": module}))
    if isinstance(source, BytesIO):
        source.seek(0)
    return safe_globals(allowed)


def _tensors_of_archive(module: Shell, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript module by their dotted names."""
    tensors: dict[str, Tensor] = {}
    for name, value in vars(module).items():
        if isinstance(value, Shell):
            tensors |= _tensors_of_archive(value, f"{prefix}{name}.")
        elif torch.is_tensor(value):
            tensors[f"{prefix}{name}"] = value.detach()
    return tensors
