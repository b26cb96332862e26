"""Recognise official checkpoints and find their converters."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.clip import is_clip, refuse_other_models
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.registry import ADAPTERS, OfficialFormat


def recognise(file: OfficialFile) -> OfficialFormat:
    """The kind of a file.

    Args:
        file: The file.

    Raises:
        AdapterError: If it is of no kind that can be converted.
    """
    known = [official for adapter in ADAPTERS.values() for official in adapter.formats]
    found = [official for official in known if official.recognises(file.tensors)]
    if is_clip(file.tensors):
        raise AdapterError(
            f"{str(file.path)!r} is a complete CLIP and no adapter. `convert_clip` (and `peft-vlm convert` without "
            "`--base_model`) makes a base model of it."
        )
    if not found:
        refuse_other_models(file.tensors)
        names = ", ".join(sorted(official.name for official in known))
        raise AdapterError(
            f"{str(file.path)!r} is of no kind that is known ({names}): its {len(file.tensors)} tensors begin "
            f"with {sorted(file.tensors)[:4]!r}."
        )
    assert len(found) == 1, f"{[official.name for official in found]} recognise the same file"
    return found[0]


def convert(source: str | Path | OfficialFile, folder: str | Path, **settings: Any) -> ConversionReport:
    """Convert an official checkpoint of any known kind to an adapter folder.

    Args:
        source: The file.
        folder: New folder.
        **settings: Arguments of the converter of that kind: see `convert_checkpoint` of the method's folder.

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
        epoch: Epoch to record in the file.

    Returns:
        Official settings that the adapter needs and no file holds, such as `START_LAYER`.

    Raises:
        AdapterError: If the method has no official format here.
    """
    name = model.active_peft_config.peft_type.value.lower()
    write = ADAPTERS[name].export if name in ADAPTERS else None
    if write is None:
        writable = sorted(adapter.name for adapter in ADAPTERS.values() if adapter.export)
        raise AdapterError(f"Expected an adapter of {writable!r}, which have an official format, got {name!r}.")
    official = write(model, tokenizer)
    official.save(path, epoch=epoch)
    return official.settings
