"""Official checkpoints: reading their tensors without running anything that is in the file, and an account of them.

Each tensor is used, set aside for a reason, or an error.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from peft_vlm.errors import AdapterError, shown

WRAPPING_KEY = "state_dict"
"""Where Dassl and many others keep the tensors inside a checkpoint."""

CONTAINERS = {"builtins.dict": dict, "collections.defaultdict": defaultdict}
"""What optimizer states are made of."""

INERT_MODULES = ("torch.optim.", "__torch__.")
"""Classes that are read as empty shells: optimizers and schedulers beside the tensors of a training checkpoint (the
warm-up of Dassl pickles a `CosineAnnealingLR` with its `SGD`), and the modules of a TorchScript archive."""


MAX_GROWTH = 4
"""How much larger than its file a checkpoint may be in memory; weights that are tied are stored once."""

MAX_DEPTH = 100
"""Modules inside modules of an archive."""


class _Shell:
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
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a checkpoint by name, and the plain values that it keeps under `metadata`."""
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"Expected a checkpoint file, got {str(path)!r}, which does not exist or is a folder.")
    content = _content(path)
    if isinstance(content, _Shell):
        content = _tensors_of_archive(content)
    metadata = content.get("metadata") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(content.get(WRAPPING_KEY), dict):
        content = content[WRAPPING_KEY]
    elif isinstance(content, dict) and isinstance(content.get("weights"), dict):
        content = _flat(content["weights"])
    named = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in named if isinstance(key, str) and torch.is_tensor(value)}
    if not tensors:
        keys = list(content)[:6] if isinstance(content, dict) else type(content).__name__
        raise AdapterError(
            f"Expected a mapping of names to tensors in {str(path)!r}, got {shown(keys)}. Pass the checkpoint itself."
        )
    _check_tensors(tensors, path)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _flat(nested: Mapping[Any, Any], prefix: str = "", seen: set[int] | None = None) -> dict[str, Any]:
    """A mapping of mappings as one, with dotted names; one that holds itself, or comes again, counts once."""
    found: dict[str, Any] = {}
    seen = seen if seen is not None else set()
    if id(nested) in seen or prefix.count(".") > MAX_DEPTH:
        return {}
    seen.add(id(nested))
    for key, value in nested.items():
        found |= _flat(value, f"{prefix}{key}.", seen) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that become larger than the file when they are copied, or that are none of numbers in memory."""
    numbers = 0
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.is_complex():
            raise AdapterError(
                f"Expected plain tensors in {str(path)!r}, got {shown(name)} as {tensor.layout}, {tensor.dtype} on "
                f"{tensor.device}. Save the file again with ordinary tensors."
            )
        numbers += tensor.numel() * tensor.element_size()
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() or numbers > _most_bytes(path):
            raise AdapterError(
                f"Expected tensors that are stored in {str(path)!r}, got {shown(name)} of shape "
                f"{tuple(tensor.shape)}, which repeats what is stored. Save the file again with `tensor.clone()`."
            )


def _most_bytes(path: Path) -> int:
    """Bytes that a file may become; what Python and torch compress, code, is small."""
    return MAX_GROWTH * path.stat().st_size + 2**26


def _content(path: Path) -> Any:
    """The content of the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_zipfile(path):
            _check_archive(path)
        source = _without_code(path) if is_zipfile(path) else path
        with _allowed(source) if is_zipfile(path) else nullcontext():
            return torch.load(source, map_location="cpu", weights_only=True)
    except AdapterError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, BadZipFile, NotImplementedError) as error:
        raise AdapterError(
            f"Expected a complete checkpoint, got {str(path)!r} with {path.stat().st_size} bytes, which cannot be "
            f"read ({_first_line(error)}). Copy or download it again."
        ) from error
    except Exception as error:  # what is no tensor, torch.load refuses by errors of the pickle module, which is unsafe
        raise AdapterError(
            f"Expected tensors and plain values in {str(path)!r}, got other objects, which are not loaded because "
            f"they could run code: {_first_line(error)} Where you trust the file, save its tensors as "
            "safetensors."
        ) from error


def _first_line(error: Exception) -> str:
    """An error's message in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than its own size allows; torch stores tensors as they are."""
    with ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _most_bytes(path):
        raise AdapterError(
            f"Expected an archive that unpacks to at most {_most_bytes(path):,} bytes, got {str(path)!r} of "
            f"{path.stat().st_size:,} bytes, which says {unpacked:,}. No release of torch writes such files: get the "
            "original."
        )


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
            allowed.append(type(qualified, (_Shell,), {"__module__": module}))
    if isinstance(source, BytesIO):
        source.seek(0)
    return safe_globals(allowed)


def _tensors_of_archive(module: _Shell, prefix: str = "", seen: set[int] | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript module by their dotted names; a module that holds itself counts once."""
    tensors: dict[str, Tensor] = {}
    seen = seen if seen is not None else set()
    if id(module) in seen or prefix.count(".") > MAX_DEPTH:
        return {}
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, _Shell):
            tensors |= _tensors_of_archive(value, f"{prefix}{name}.", seen)
        elif torch.is_tensor(value):
            tensors[f"{prefix}{name}"] = value.detach()
    return tensors


FROZEN_TOLERANCE = 0.02
"""Largest difference, as a share of a tensor's largest entry, that still counts as the same frozen weights: averaging
twenty half-precision models (PromptSRC) moves them by up to 1 %, another CLIP's differ by all of it."""


@dataclass(frozen=True)
class ConversionReport:
    """Account of the conversion of an official checkpoint.

    Args:
        kind: Kind of the file, such as `"CoOp"`.
        source: Name of the file.
        config: Configuration of the adapter that was written.
        used: Tensors that went into the adapter.
        unused: Tensors of the file that did not, and why.
        missing: Tensors of that kind of file which this one lacks, and where their values come from.
        notes: Further remarks, one sentence each.
    """

    kind: str
    source: str
    config: Any
    used: tuple[str, ...]
    unused: dict[str, str]
    missing: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "kind": self.kind,
            "method": self.config.peft_type.value.lower(),
            "source": self.source,
            "class_names": self.config.class_names,
            "used": list(self.used),
            "unused": self.unused,
            "missing": self.missing,
            "notes": list(self.notes),
        }


class OfficialFile:
    """Tensors of an official checkpoint, with an account of their use.

    Args:
        path: Path of the file.
        tensors: By their official names.
        metadata: Plain values that the file holds beside them.
    """

    def __init__(
        self, path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.tensors, self.metadata = Path(path), dict(tensors), dict(metadata or {})
        self.used: list[str] = []
        self.unused: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []

    @classmethod
    def open(cls, source: "str | Path | OfficialFile") -> "OfficialFile":
        """Read a file, or continue with one that was read.

        Args:
            source: Path of a checkpoint, or what `open` gave.
        """
        return source if isinstance(source, OfficialFile) else cls(source, *_read(source))

    def take(self, name: str) -> Tensor:
        """A tensor for the adapter; floating point as float32.

        Args:
            name: Its official name.

        Raises:
            AdapterError: If the file does not hold it, or it has values that are not finite.
        """
        if name not in self.tensors:
            raise AdapterError(
                f"Expected the tensor {name!r} in {str(self.path)!r}, got {sorted(self.tensors)[:6]!r}."
            )
        self.used.append(name)
        tensor = self.tensors[name].detach()
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"Expected finite values in {name!r} of {str(self.path)!r}, got inf or nan.")
        return tensor.float().contiguous() if tensor.is_floating_point() else tensor

    def names(self, pattern: str) -> list[str]:
        """Names of the tensors that match a regular expression in full.

        Args:
            pattern: Regular expression.
        """
        return [name for name in self.tensors if re.fullmatch(pattern, name)]

    def set_aside(self, pattern: str, reason: str) -> None:
        """Mark tensors as unused, with a reason.

        Args:
            pattern: Regular expression over full names.
            reason: Why, for the report.
        """
        self.unused |= dict.fromkeys(self.names(pattern), reason)

    def note(self, sentence: str) -> None:
        """Add a sentence to the report.

        Args:
            sentence: The sentence.
        """
        self.notes.append(sentence)

    def compare_frozen(self, base: Mapping[str, Tensor], *, base_name: str) -> None:
        """Set the frozen weights aside after checking that they are the base model's.

        Args:
            base: The base model's weights by the official names of frozen tensors.
            base_name: Of the base model, for messages.

        Raises:
            AdapterError: If a tensor has another shape or other values.
        """
        differences: dict[str, float] = {}
        for name, expected in base.items():
            if name not in self.tensors:
                self.missing[name] = f"taken from {base_name}"
                continue
            difference = _difference(self.tensors[name], expected)
            if difference > FROZEN_TOLERANCE:
                raise AdapterError(
                    f"{str(self.path)!r} was made on another CLIP than {base_name!r}: the frozen tensor {name!r} of "
                    f"shape {tuple(self.tensors[name].shape)} differs from the base model's, {tuple(expected.shape)}"
                    f"{f', by {difference:.0%} of its largest entry' if difference < float('inf') else ''}. Pass the "
                    "base model of the training."
                )
            differences[name] = difference
        averaged = f"frozen, within {max(differences.values(), default=0.0):.1e} of the base model's"
        for name, difference in differences.items():
            self.unused[name] = averaged if difference else "frozen, equal to the base model's"

    def report(self, kind: str, config: Any) -> ConversionReport:
        """Return the report; refuse if a tensor is unaccounted for.

        Args:
            kind: Kind of the file.
            config: Configuration of the adapter.

        Raises:
            AdapterError: If a tensor of the file was neither used nor set aside.
        """
        unknown = [name for name in self.tensors if name not in self.unused and name not in self.used]
        if unknown:
            raise AdapterError(
                f"{str(self.path)!r} looks like a file of {kind}, but holds {len(unknown)} tensors that those do not "
                f"have: {unknown[:4]!r}. It comes from another method or version, whose outputs may depend on them."
            )
        return ConversionReport(
            kind, self.path.name, config, tuple(self.used), dict(self.unused), dict(self.missing), tuple(self.notes)
        )


def _difference(tensor: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected entry, in the precision of the tensor; inf for a shape."""
    if tensor.shape != expected.shape:
        return float("inf")
    rounded = expected.to(tensor.dtype)
    if torch.equal(tensor, rounded):
        return 0.0
    difference = float((tensor.float() - rounded.float()).abs().max() / rounded.float().abs().max())
    return float("inf") if difference != difference else difference
