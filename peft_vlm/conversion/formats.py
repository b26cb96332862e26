"""Which official checkpoint a file is, and who converts it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.clip_names import is_clip, refuse_other_models
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError

Names = Mapping[str, Tensor]


@dataclass(frozen=True)
class OfficialFormat:
    """One kind of official checkpoint.

    Args:
        name: What its makers call it.
        recognises: Whether tensors are of this kind, by their names.
        convert: Writes an adapter: `convert(file, folder, **settings)`.
        method: The method of the adapter.
    """

    name: str
    recognises: Callable[[Names], bool]
    convert: Callable[..., ConversionReport]
    method: str

    def settings(self) -> dict[str, bool]:
        """What the converter takes beside file and folder: name, and whether it must be given."""
        parameters = inspect.signature(self.convert).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


FORMATS: dict[str, OfficialFormat] = {}
"""Kinds of files that become adapters; every method adds its own when it is imported."""

EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {}
"""Writers of official files by method: `export(model, path, tokenizer=..., epoch=...)` gives the official settings
that belong to the file."""

REFUSED: dict[str, Callable[[Names], bool]] = {
    "CoCoOp": lambda names: "meta_net.linear2.weight" in names,
    "MaPLe": lambda names: "prompt_learner.proj.weight" in names,
}
"""Official methods that are no method here, by a tensor that only they have."""


def register_format(official: OfficialFormat) -> None:
    """Make a kind of file known.

    Args:
        official: The kind.
    """
    FORMATS[official.name] = official


def register_export(method: str, export: Callable[..., dict[str, Any]]) -> None:
    """Make a writer of official files known.

    Args:
        method: Name of the method.
        export: The writer.
    """
    EXPORTS[method] = export


def recognise(file: OfficialFile) -> OfficialFormat:
    """The kind of a file.

    Args:
        file: The file.

    Raises:
        AdapterError: If it is of no kind that can be converted; methods that are known but not supported are named.
    """
    for name, matches in REFUSED.items():
        if matches(file.tensors):
            raise AdapterError(
                f"{str(file.path)!r} is a checkpoint of {name}, which is no method of this package: no adapter could "
                f"give its outputs. Kinds that can be converted: {', '.join(sorted(FORMATS))}."
            )
    if is_clip(file.tensors):
        raise AdapterError(
            f"{str(file.path)!r} is a whole CLIP and no adapter. `convert_clip` (and `peft-vlm convert` without "
            "`--base_model`) makes a base model of it."
        )
    found = [official for official in FORMATS.values() if official.recognises(file.tensors)]
    if not found:
        refuse_other_models(file.tensors)
        raise AdapterError(
            f"{str(file.path)!r} is of no kind that is known ({', '.join(sorted(FORMATS))}): its {len(file.tensors)} "
            f"tensors begin with {sorted(file.tensors)[:4]!r}."
        )
    assert len(found) == 1, f"{[official.name for official in found]} recognise the same file"
    return found[0]


def convert(source: str | Path | OfficialFile, folder: str | Path, **settings: Any) -> ConversionReport:
    """Convert an official checkpoint of any known kind to an adapter folder.

    Args:
        source: The file.
        folder: New folder.
        **settings: What the converter of that kind takes: see `convert_checkpoint` of the method's folder.

    Returns:
        What became of each tensor of the file.

    Raises:
        AdapterError: If a setting is missing or not one of that kind.
    """
    file = OfficialFile.open(source)
    official = recognise(file)
    known = official.settings()
    unknown = [name for name in settings if name not in known]
    missing = [name for name, needed in known.items() if needed and settings.get(name) is None]
    if unknown or missing:
        raise AdapterError(
            f"{str(file.path)!r} is a checkpoint of {official.name}. "
            + (f"Missing: {', '.join(f'`{n}`' for n in missing)}, which the file does not hold. " if missing else "")
            + (f"Not for this kind: {', '.join(f'`{n}`' for n in unknown)}. " if unknown else "")
            + f"It takes {', '.join(f'`{name}`' for name in known)}."
        )
    return official.convert(file, folder, **settings)


def export(
    model: PeftModel, path: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, epoch: int = 1
) -> dict[str, Any]:
    """Write an adapter as the checkpoint file that its method's official code loads.

    Args:
        model: Model with the active adapter.
        path: The file; an older one is replaced. The official codes look for `model.pth.tar-<epoch>`.
        tokenizer: The base model's, for the class prompts that prompt learners store; official loaders drop them.
        epoch: What the file says of its epoch.

    Returns:
        Official settings that the adapter needs and no file holds, such as `START_LAYER`.

    Raises:
        AdapterError: If the method has no official format here.
    """
    method = model.active_peft_config.peft_type.value.lower()
    if method not in EXPORTS:
        raise AdapterError(
            f"Expected an adapter of {sorted(EXPORTS)!r}, which have an official format, got {method!r}."
        )
    return EXPORTS[method](model, path, tokenizer=tokenizer, epoch=epoch)
