"""An official checkpoint with an account of its tensors: each is used, set aside for a reason, or an error."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_vlm.conversion.checkpoint import read_checkpoint
from peft_vlm.errors import AdapterError

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
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = Path(path), dict(tensors)
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
        return source if isinstance(source, OfficialFile) else cls(source, read_checkpoint(source))

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
