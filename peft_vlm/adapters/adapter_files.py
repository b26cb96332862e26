"""The files of an adapter: read from its own folder or one repository only, and checked before anything is built.

Adapters of PEFT's own types may come from anybody too: what their configuration may ask for, and their weights hold.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError, safe_open

from peft_vlm.errors import AdapterError, HubError, explained, shown
from peft_vlm.files import CLASSES_NAME, CONFIG_NAME, WEIGHTS_NAME, file_inside, read_class_names_file, read_json
from peft_vlm.models.repository import hub_answers, is_local, why_cache_only

MAX_CLASSES_BYTES = 2**26
MAX_HEADER_BYTES = 2**24
"""Longest header of a safetensors file that is read: 100,000 tensors have one of about 10 MB."""

Shape = tuple[int | None | EllipsisType, ...] | EllipsisType
"""A shape that is expected: None is any size, `...` any further sizes."""

MODULE_NAME = re.compile(r"\w+(\.\w+)*")

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class AdapterSource:
    """A folder, or a repository of the Hub, that an adapter's files are read from.

    Args:
        name: Folder or Hub id.
        subfolder: Folder inside it.
        options: Arguments of `hf_hub_download`; empty for a folder.
    """

    name: str
    subfolder: str
    options: Mapping[str, Any]

    @classmethod
    def find(
        cls,
        adapter: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> "AdapterSource":
        """Decide where an adapter is read from; the Hub is asked once whether it has a repository.

        Args:
            adapter: Folder or Hub id.
            subfolder: Folder inside it.
            revision: Branch, tag or commit on the Hub.
            token: Token of the Hub.
            cache_dir: Cache of the Hub; None for the usual one.
            local_files_only: Ask nobody.

        Raises:
            AdapterError: If there is no such folder and it is no Hub id.
        """
        name = str(adapter)
        if is_local(name):
            if not (Path(name) / (subfolder or "")).is_dir():
                raise AdapterError(
                    f"Expected the folder of an adapter, got {str(Path(name, subfolder or ''))!r}, which is none. "
                    f"Pass the folder that holds {CONFIG_NAME!r}, or a Hub id."
                )
            return cls(name, subfolder or "", {})
        cache_only = local_files_only or not hub_answers(name, revision=revision, token=token)
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": cache_only}
        return cls(name, subfolder or "", options)

    def file(self, name: str) -> Path | None:
        """A file of the adapter; None where there is none.

        Args:
            name: Name of the file.

        Raises:
            HubError: If it cannot be downloaded.
        """
        if not self.options:
            return file_inside(Path(self.name) / self.subfolder, name)
        try:
            with explained(f"{name!r} of {self.name!r} could not be downloaded"):
                return Path(hf_hub_download(self.name, name, subfolder=self.subfolder or None, **self.options))
        except HubError as error:
            cause = error.__cause__
            if isinstance(cause, LocalEntryNotFoundError) and self.options["local_files_only"]:
                raise HubError(f"{name!r} of {self.name!r} cannot be read: {why_cache_only()}.") from error
            if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
                return None
            raise

    def config(self) -> dict[str, Any]:
        """The values of `adapter_config.json`.

        Raises:
            AdapterError: If there is none, or it holds something else than named values.
        """
        path = self.file(CONFIG_NAME)
        if path is None:
            folder = Path(self.name, self.subfolder)
            exported = sorted(
                str(path) for kind in ("onnx", "safetensors") for path in folder.glob(f"classifier.{kind}")
            )
            advice = (
                f"It is the folder of an exported classifier: pass {exported[0]!r}."
                if exported
                else "An adapter that is not called `default` is in a subfolder of its name."
            )
            raise AdapterError(f"Expected {CONFIG_NAME!r} in {str(folder)!r}, got none. {advice}")
        values = read_json(path)
        if not isinstance(values, dict):
            raise AdapterError(
                f"Expected names and values in {str(path)!r}, got {shown(values)}. The file is damaged: get it again."
            )
        return values

    def class_names(self, name: str, count: int | None) -> list[str]:
        """The class names that stand in a file of their own.

        Args:
            name: Name of that file, as the configuration has it.
            count: How many there must be; None: unknown.

        Raises:
            AdapterError: If there is no such file in the folder, or another one is named.
        """
        if name != CLASSES_NAME:
            raise AdapterError(
                f"Expected `class_names_file` to be {CLASSES_NAME!r}, got {shown(name)}. Class names are read from "
                "the adapter's own folder only: put the file there."
            )
        path = self.file(name)
        if path is None:
            raise AdapterError(
                f"Expected {name!r} beside {CONFIG_NAME!r} in {self.name!r}, got none. Get the whole folder again."
            )
        try:
            if path.stat().st_size > MAX_CLASSES_BYTES:
                raise ValueError(f"it has more than {MAX_CLASSES_BYTES:,} bytes")
            return read_class_names_file(path, count)
        except AdapterError:
            raise
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"Expected class names, one a line, in {str(path)!r}, got something else ({error}). Get it again."
            ) from error

    def weights(self) -> Path:
        """The weights file.

        Raises:
            AdapterError: If there is none; a folder is never completed from elsewhere.
        """
        path = self.file(WEIGHTS_NAME)
        if path is None:
            raise AdapterError(
                f"Expected {WEIGHTS_NAME!r} in {str(Path(self.name, self.subfolder))!r}, got none. An adapter is read "
                "from its own folder only: get the whole folder again."
            )
        return path

    def folder(self) -> Path:
        """The folder of this machine that holds configuration and weights, downloaded where they are not."""
        return self.weights().parent


def _header_of(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a safetensors file, without reading any tensor."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if len(start) < 8 or struct.unpack("<Q", start)[0] > MAX_HEADER_BYTES:
            raise ValueError(f"no header of at most {MAX_HEADER_BYTES:,} bytes")
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dictionary
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise AdapterError(
            f"Expected a complete safetensors file, got {str(path)!r} with {size} bytes, which cannot be read "
            f"({error}). The file is cut off or damaged: copy or download it again."
        ) from error


def check_header(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Compare a weights file with the sizes that its configuration names, before memory is asked for.

    Args:
        path: The safetensors file.
        shapes: Shapes by regular expressions over whole names.

    Raises:
        AdapterError: If a tensor is of another size, is missing, or holds anything but floating-point numbers.
    """
    header = _header_of(path)
    for name, (_, dtype) in header.items():
        if dtype not in FLOATS and not (dtype == "I64" and name.endswith("num_batches_tracked")):
            raise AdapterError(
                f"Expected floating-point numbers in {str(path)!r}, got {dtype} in the tensor {shown(name)}. The file "
                "is no adapter of this kind: get the original."
            )
    for pattern, wanted in shapes.items():
        found = {name: shape for name, (shape, _) in header.items() if re.fullmatch(pattern, name)}
        wrong = {name: shape for name, shape in found.items() if not _fits(shape, wanted)}
        if wrong or not found:
            name, shape = next(iter(wrong.items()), ("no tensor", ()))
            raise AdapterError(
                f"Expected tensors of shape {_in_words(wanted)} by the configuration, got {shown(name)} of shape "
                f"{shape} in {str(path)!r}. Weights and {CONFIG_NAME!r} do not belong together: get the folder again."
            )


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    """Whether a shape is one that is expected."""
    sides = wanted if isinstance(wanted, tuple) else (wanted,)
    if sides[-1] is ...:
        sides = (*sides[:-1], *[None] * (len(shape) - len(sides) + 1))
    return len(shape) == len(sides) and all(side in (None, size) for size, side in zip(shape, sides, strict=True))


def _in_words(wanted: Shape) -> str:
    """A shape for a message."""
    sides = wanted if isinstance(wanted, tuple) else (wanted,)
    return " x ".join({None: "any", ...: "any"}.get(side) or shown(side) for side in sides)


_ENDLESS = re.compile(r"\)[*+{]|([^*+{]*[*+{]){5}")
"""Patterns whose matching takes more than a polynomial number of steps, or one of a high degree."""


_OUTWARD = {
    "megatron_config": "names a Python module that would be imported",
    "layer_replication": "repeats layers of the base model",
    "adapters": "names further adapters",
    "shadow_model": "names another model",
    **dict.fromkeys(("tokenizer_name_or_path", "prompt_tuning_init_state_dict_path"), "names another file"),
}
"""Settings by which PEFT reads or runs something that is not in the adapter's folder."""

_NO_SIZES = re.compile(r".*(alpha|seed|step|key|init|final|interval|dropout).*")
"""Whole numbers that no tensor is as large as."""

_USUAL = 256
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
    for name, what in _OUTWARD.items():
        if values.get(name):
            raise AdapterError(
                f"Expected no `{name}` in the configuration of {where!r}, got {shown(values[name])}, which {what}. If "
                "you trust the adapter, load it with PEFT."
            )
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and MODULE_NAME.fullmatch(name) for name in saved):
        raise AdapterError(
            f"Expected names of modules in `modules_to_save` of {where!r}, got {shown(saved)}. Get it again."
        )
    for pattern in _patterns(values):
        if len(pattern) > 1000 or _ENDLESS.search(pattern):
            raise AdapterError(
                "Expected module names, or a pattern with at most four of `*` and `+` and none behind a group, got "
                f"{shown(pattern)}. Such a pattern can take for ever: if you trust the adapter, write it otherwise."
            )


def check_foreign_weights(path: Path, config: PeftConfig) -> None:
    """Compare a weights file with its configuration, before memory is asked for, and look for numbers that are none.

    Args:
        path: The safetensors file.
        config: Its configuration, of one of PEFT's own types.

    Raises:
        AdapterError: If a tensor would replace a parameter of the base model, is not finite, or a setting asks for
            larger tensors than there are.
    """
    check_header(path, _foreign_shapes(config))
    values, header = config.to_dict(), _header_of(path)
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
        if value > _USUAL and value not in sizes and not _NO_SIZES.fullmatch(name):
            raise AdapterError(
                f"Expected a tensor of size `{name}`={shown(value)} by the configuration, got none in {str(path)!r}. "
                "Weights and configuration do not belong together: get the folder again."
            )
    with safe_open(path, framework="pt") as tensors:
        for name in header:
            if not bool(torch.isfinite(tensors.get_tensor(name)).all()):
                raise AdapterError(f"Expected finite numbers in {shown(name)} of {str(path)!r}, got inf or nan.")


def _foreign_shapes(config: PeftConfig) -> dict[str, Shape]:
    """Shapes that the rank of a LoRA gives to its tensors."""
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
