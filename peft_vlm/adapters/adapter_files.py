"""The files of an adapter: read from its own folder or one repository only, and checked before anything is built."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from peft_vlm.errors import AdapterError, HubError, explained, shown
from peft_vlm.files import CLASSES_NAME, CONFIG_NAME, WEIGHTS_NAME, file_inside, read_class_names_file, read_json
from peft_vlm.models.repository import hub_answers, is_local, why_cache_only

MAX_CLASSES_BYTES = 2**26
MAX_HEADER_BYTES = 2**24
"""Longest header of a safetensors file that is read: 100,000 tensors have one of about 10 MB."""

Shape = tuple[int | None | EllipsisType, ...] | EllipsisType
"""A shape that is expected: None is any size, `...` any further sizes."""

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


def header_of(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a safetensors file, without reading any tensor.

    Args:
        path: The file.

    Raises:
        AdapterError: If the file is cut off or no safetensors file.
    """
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
    header = header_of(path)
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
