"""The part of an adapter's configuration that every method shares, and the checks made when an adapter is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, no_type_check

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from peft_vlm.errors import AdapterError
from peft_vlm.files import CLASSES_NAME, installed_version, read_class_names_file, write_class_names

FORMAT_VERSION = 1
"""Layout of adapter folders that this release writes. Raised when an older release could misread a newer folder."""

MAX_LISTED_CLASSES = 2000
"""Longest class list inside `adapter_config.json`; longer ones stand in `class_names.txt` beside it."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_adapter_file(folder: Path) -> None:
    """Refuse a damaged weights file before PEFT builds a model around it.

    Args:
        folder: Local adapter folder. A folder without the file is left to PEFT, which names what is missing.

    Raises:
        AdapterError: If the file cannot be read as safetensors, for example because a download was cut off.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise AdapterError(
            f"Expected a complete safetensors file, got {str(path)!r} with {path.stat().st_size} bytes, "
            f"which cannot be read ({error}). The file is cut off or damaged: copy or download it again."
        ) from error


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class VLMConfig(PeftConfig):
    """Configuration that the adapters of all methods share; everything needed to rebuild and to use an adapter.

    Args:
        target_modules: Modules that carry adapter tensors, as a regular expression over module names. Filled in by the
            method from its own settings; setting it by hand is refused.
        exclude_modules: Not used by the methods of this package; PEFT expects the field.
        modules_to_save: Further modules to train and store whole, by PEFT's own mechanism.
        class_names: Names of the classes the adapter was trained on, in label order. Written by the trainer.
        class_names_file: File beside the configuration with the names, one a line, when there are more than 2,000.
        num_class_names: How many names that file has.
        template: Text around a class name, with one `{}`; a list is an ensemble. Written by the trainer.
        image_mean: Channel means of the image processor used in training, in [0, 1] pixel units.
        image_std: Channel standard deviations of that processor.
        image_size: Rows and columns of the images that the model saw.
        base_architecture: Sizes of the base model. Recorded on creation; a base with other sizes is refused on
            loading.
        init_weights: False starts from perturbed instead of initial values, which makes an untrained adapter change
            the output. For tests.
        format_version: Layout of the adapter folder.
        peft_vlm_version: Release that wrote the adapter.
    """

    target_modules: str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    class_names: list[str] | None = field(default=None)
    class_names_file: str | None = field(default=None)
    num_class_names: int | None = field(default=None)
    template: str | list[str] | None = field(default=None)
    image_mean: list[float] | None = field(default=None)
    image_std: list[float] | None = field(default=None)
    image_size: list[int] | None = field(default=None)
    base_architecture: dict[str, Any] | None = field(default=None)
    init_weights: bool = field(default=True)
    format_version: int = field(default=FORMAT_VERSION)
    peft_vlm_version: str = field(default_factory=installed_version)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format_version > FORMAT_VERSION:
            raise AdapterError(
                f"Expected an adapter of format version {FORMAT_VERSION} or older, got "
                f"{self.format_version!r}, written by peft_vlm {self.peft_vlm_version}. "
                "Install a newer release of peft_vlm."
            )
        if isinstance(self.class_names, str):
            raise ValueError(f"Expected `class_names` to be a list of names or None, got {self.class_names!r}.")
        if self.task_type is not None:
            raise ValueError(
                f"Expected `task_type`=None, got {self.task_type!r}. PEFT's task wrappers pass arguments that "
                "vision-language models do not accept; leave it out."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a configuration as PEFT does; for a local folder the weights file beside it is checked first.

        Args:
            pretrained_model_name_or_path: Local folder or Hub id.
            subfolder: Folder inside it.
            **kwargs: Passed to PEFT.
        """
        check_adapter_file(Path(pretrained_model_name_or_path) / (subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.class_names_file is not None:
            options = {
                key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
            }
            options["subfolder"] = subfolder or ""
            names = cached_file(pretrained_model_name_or_path, config.class_names_file, **options)
            config.class_names = read_class_names_file(Path(names), config.num_class_names)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and a long class list into a file of its own.

        Args:
            save_directory: Folder.
            **kwargs: Passed to PEFT.
        """
        names = self.class_names
        is_long = len(names or ()) > MAX_LISTED_CLASSES
        self.class_names_file, self.num_class_names = (CLASSES_NAME, len(names or ())) if is_long else (None, None)
        if self.class_names_file is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        self.class_names = None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.class_names = names
        write_class_names(Path(save_directory) / CLASSES_NAME, names or ())

    def method_settings(self) -> dict[str, Any]:
        """The settings that only this method has, as JSON values by name."""
        return {name: value for name, value in self.to_dict().items() if name not in VLMConfig.__dataclass_fields__}

    def prompt_image(self, tensors: dict[str, Tensor]) -> Image.Image | None:
        """The adapter as an image, for pixel prompts; None for all others.

        Args:
            tensors: The weights file.
        """
        return None


def read_config(adapter: str | Path, **kwargs: Any) -> PeftConfig:
    """The configuration of an adapter of any method, with a class list that stands in a file of its own.

    Args:
        adapter: Local folder or Hub id.
        **kwargs: Passed to PEFT.
    """
    config = PeftConfig.from_pretrained(str(adapter), **kwargs)
    if isinstance(config, VLMConfig) and config.class_names_file is not None:
        return type(config).from_pretrained(str(adapter), **kwargs)
    return config


def architecture_of(model_config: dict[str, Any]) -> dict[str, Any]:
    """Sizes that decide whether an adapter fits a base model, as JSON values.

    Args:
        model_config: `model.config.to_dict()` of a two-tower model.
    """
    sizes: dict[str, Any] = {"model_type": model_config.get("model_type")}
    for tower in ("text", "vision"):
        tower_config = model_config.get(f"{tower}_config") or {}
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size"):
            if key in tower_config:
                sizes[f"{tower}_{key}"] = tower_config[key]
    if "projection_dim" in model_config:
        sizes["projection_dim"] = model_config["projection_dim"]
    return sizes


def check_architecture(config: VLMConfig, model_config: dict[str, Any]) -> None:
    """Refuse a base model whose sizes differ from the one the adapter was made for.

    Args:
        config: Adapter configuration; `base_architecture` is None for a new adapter.
        model_config: `model.config.to_dict()` of the base model at hand.

    Raises:
        AdapterError: If a size differs; the message lists each.
    """
    if config.base_architecture is None:
        return
    actual = architecture_of(model_config)
    different = [
        f"{key}: adapter {value!r}, this model {actual.get(key)!r}"
        for key, value in config.base_architecture.items()
        if actual.get(key) != value
    ]
    if different:
        raise AdapterError(
            f"The adapter was made for another base model ({'; '.join(different)}). Load it onto "
            f"{config.base_model_name_or_path or 'the model it was trained on'!r}."
        )
