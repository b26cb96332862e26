"""Adapters of PEFT's own types from anybody: what their configuration may ask for, and what their weights may hold."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open

from peft_vlm.adapters.adapter_files import Shape, header_of
from peft_vlm.errors import AdapterError, shown

ENDLESS = re.compile(r"\)[*+{]|([^*+{]*[*+{]){5}")
"""Patterns whose matching takes more than a polynomial number of steps, or one of a high degree."""

NAME = re.compile(r"\w+(\.\w+)*")

OUTWARD = {
    "megatron_config": "names a Python module that would be imported",
    "layer_replication": "repeats layers of the base model",
    "adapters": "names further adapters",
    "shadow_model": "names another model",
    **dict.fromkeys(("tokenizer_name_or_path", "prompt_tuning_init_state_dict_path"), "names another file"),
}
"""Settings by which PEFT reads or runs something that is not in the adapter's folder."""

NO_SIZES = re.compile(r".*(alpha|seed|step|key|init|final|interval|dropout).*")
"""Whole numbers that no tensor is as large as."""

USUAL = 256
"""A size up to which a setting needs no tensor of that size in the file."""


def check_foreign_config(config: PeftConfig, where: str) -> None:
    """Refuse what leads out of the adapter's folder, or never ends.

    Args:
        config: Configuration of another package.
        where: The adapter, for the message.

    Raises:
        AdapterError: If it is of a type that wraps no layers, or a setting leads elsewhere or could take for ever.
    """
    values = config.to_dict()
    kind = str(values["peft_type"])
    if config.is_prompt_learning or config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise AdapterError(
            f"Expected an adapter in the layers of a CLIP in {where!r}, got one of PEFT's {kind!r}, which is for text "
            "models. Pass an adapter of this package, or one such as LoRA."
        )
    for name, what in OUTWARD.items():
        if values.get(name):
            raise AdapterError(
                f"Expected no `{name}` in the configuration of {where!r}, got {shown(values[name])}, which {what}. If "
                "you trust the adapter, load it with PEFT."
            )
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and NAME.fullmatch(name) for name in saved):
        raise AdapterError(
            f"Expected names of modules in `modules_to_save` of {where!r}, got {shown(saved)}. Get it again."
        )
    for pattern in _patterns(values):
        if len(pattern) > 1000 or ENDLESS.search(pattern):
            raise AdapterError(
                "Expected module names, or a pattern with at most four of `*` and `+` and none behind a group, got "
                f"{shown(pattern)}. Such a pattern can take for ever: if you trust the adapter, write it otherwise."
            )


def check_foreign_weights(path: Path, config: PeftConfig) -> None:
    """Compare a weights file with its configuration, before memory is asked for, and look for numbers that are none.

    Args:
        path: The safetensors file, whose header was checked.
        config: Its configuration, of one of PEFT's own types.

    Raises:
        AdapterError: If a tensor would replace a parameter of the base model, is not finite, or a setting asks for
            larger tensors than there are.
    """
    values, header = config.to_dict(), header_of(path)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "").partition("_")[0] + "_"
    saved = [re.compile(rf"(.*\.)?{re.escape(name)}\.") for name in values.get("modules_to_save") or ()]
    for name in header:
        is_bias = values.get("bias", "none") != "none" and name.endswith(".bias")
        if prefix not in name and not is_bias and not any(pattern.match(name) for pattern in saved):
            raise AdapterError(
                f"Expected tensors of the adapter in {str(path)!r}, got the unknown {shown(name)}, which would "
                "replace a parameter of the base model for good. Get the original file."
            )
    sizes = {size for shape, _ in header.values() for size in shape}
    for name, value in _numbers(values):
        if value > USUAL and value not in sizes and not NO_SIZES.fullmatch(name):
            raise AdapterError(
                f"Expected a tensor of size `{name}`={shown(value)} by the configuration, got none in {str(path)!r}. "
                "Weights and configuration do not belong together: get the folder again."
            )
    with safe_open(path, framework="pt") as tensors:
        for name in header:
            if not bool(torch.isfinite(tensors.get_tensor(name)).all()):
                raise AdapterError(f"Expected finite numbers in {shown(name)} of {str(path)!r}, got inf or nan.")


def foreign_shapes(config: PeftConfig) -> dict[str, Shape]:
    """Shapes that the rank of a LoRA gives to its tensors.

    Args:
        config: Configuration of another package.
    """
    values = config.to_dict()
    rank = values.get("r")
    is_plain = values["peft_type"] == "LORA" and not values.get("rank_pattern") and isinstance(rank, int)
    return {r".*\.lora_(A\.weight|embedding_A)": (rank, ...)} if is_plain else {}


def _patterns(values: Mapping[str, Any]) -> Iterator[str]:
    """Texts that PEFT may match against names of modules."""
    for name, value in values.items():
        if re.search("pattern|modules|layers|parameters", name):
            entries = [value] if isinstance(value, str) else value if isinstance(value, list | set | dict) else []
            yield from (entry for entry in entries if isinstance(entry, str))


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers that may be sizes, also those by the name of a module."""
    for name, value in values.items():
        entries = value.values() if isinstance(value, dict) and name.endswith("pattern") else [value]
        yield from ((name, entry) for entry in entries if isinstance(entry, int) and not isinstance(entry, bool))
