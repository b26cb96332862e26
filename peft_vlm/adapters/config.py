"""The part of an adapter's configuration that every method shares, and the checks made when an adapter is loaded."""

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_origin, no_type_check

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_vlm.adapters.adapter_files import (
    MODULE_NAME,
    AdapterSource,
    Shape,
    check_foreign_config,
    check_foreign_weights,
    check_header,
)
from peft_vlm.errors import AdapterError, PeftVLMWarning, shown
from peft_vlm.files import (
    CLASSES_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    installed_version,
    is_of,
    read_json,
    write_class_names,
    write_json,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Layout of adapter folders that this release writes. Raised when an older release could misread a newer folder."""

MAX_LISTED_CLASSES = 2000
"""Longest class list inside `adapter_config.json`; longer ones stand in `class_names.txt` beside it."""

PEFT_FIELDS = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), str | None),
    **{"inference_mode": bool, "auto_mapping": dict | None},
}
"""Types of the fields that PEFT's own class declares; its annotations are text."""

IN_WORDS = {
    **{int: "an integer", float: "a finite number", str: "text", bool: "True or False", NoneType: "None"},
    **{dict: "names and values"},
}

#: Layers of each tower of the model that official settings are for, CLIP's ViT-B/16.
OFFICIAL_LAYERS = 12

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_adapter_file(folder: Path) -> None:
    """Refuse a damaged weights file, or one that does not hold floating-point numbers.

    Args:
        folder: Local adapter folder.

    Raises:
        AdapterError: If there is no such file, or it cannot be read as safetensors, for example because a download
            was cut off.
    """
    check_header(AdapterSource.find(folder).weights(), {})


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class VLMConfig(PeftConfig):
    """Configuration that the adapters of all methods share; everything needed to rebuild and to use an adapter.

    Args:
        target_modules: Modules that carry adapter tensors, as a regular expression over module names. Filled in by the
            method from its own settings; setting it by hand is refused.
        exclude_modules: Only None: the methods choose their modules themselves; PEFT expects the field.
        modules_to_save: Names of further modules to train and store whole, by PEFT's own mechanism.
        class_names: Names of the classes the adapter was trained on, in label order. Written by the trainer.
        class_names_file: File beside the configuration with the names, one a line, when there are more than 2,000.
        num_class_names: How many names that file has.
        template: Text around a class name, with one `{}`; a list is an ensemble. Written by the trainer.
        image_mean: Channel means of the image processor used in training, in [0, 1] pixel units.
        image_std: Channel standard deviations of that processor.
        image_size: Rows and columns of the images that the model saw.
        value_range: Numbers that were black and white in training images of more than 8 bits; None: those of the type.
        base_architecture: What the base model is made of: sizes, heads, activation, image and patch size, vocabulary,
            text length. Recorded on creation; a base that differs in one of them is refused on loading.
        base_digest: Digest of a few values of each of its matrices, by `base_digest`. Recorded on creation; a base
            with other weights gives a warning on loading.
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
    value_range: list[float] | None = field(default=None)
    base_architecture: dict[str, Any] | None = field(default=None)
    base_digest: str | None = field(default=None)
    init_weights: bool = field(default=True)
    format_version: int = field(default=FORMAT_VERSION)
    peft_vlm_version: str = field(default_factory=installed_version)

    #: Settings that are None until the adapter is put on a model.
    fits_model: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        if self.format_version > FORMAT_VERSION:
            raise AdapterError(
                f"Expected an adapter of format version {FORMAT_VERSION} or older, got "
                f"{shown(self.format_version)}, written by peft_vlm {shown(self.peft_vlm_version)}. "
                "Install a newer release of peft_vlm."
            )
        for name in self.fits_model if self.base_architecture is not None else ():
            if getattr(self, name) is None:
                raise ValueError(f"Expected `{name}` to be an integer in an adapter that has a base model, got None.")
        if self.task_type is not None:
            raise ValueError(
                f"Expected `task_type`=None, got {self.task_type!r}. PEFT's task wrappers pass arguments that "
                "vision-language models do not accept; leave it out."
            )
        if self.exclude_modules is not None:
            raise ValueError(
                f"Expected `exclude_modules`=None, got {shown(self.exclude_modules)}. The method chooses its modules "
                "from its own settings; leave it out."
            )
        for name in self.modules_to_save or ():
            if not MODULE_NAME.fullmatch(name):
                raise ValueError(
                    f"Expected names of modules in `modules_to_save`, got {shown(name)}. Write them as in "
                    "`model.named_modules()`."
                )

    def _check_types(self) -> None:
        """Refuse values of another type than the field's, which fail later and far from here."""
        for setting in fields(self):
            kind = PEFT_FIELDS.get(setting.name, setting.type)
            value = getattr(self, setting.name)
            if not isinstance(kind, str) and not is_of(value, kind):
                raise TypeError(f"Expected `{setting.name}` to be {_in_words(kind)}, got {shown(value)}.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a configuration as PEFT does; the weights beside it are compared with it before a model is built.

        Args:
            pretrained_model_name_or_path: Local folder or Hub id.
            subfolder: Folder inside it.
            **kwargs: Passed to PEFT.
        """
        known = ("revision", "token", "cache_dir", "local_files_only")
        options = {name: kwargs[name] for name in known if name in kwargs}
        source = AdapterSource.find(str(pretrained_model_name_or_path), subfolder=subfolder, **options)
        config = config_of(source)
        check_weights(source, config)
        return config

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Give settings that are None, which nobody asked for, values that fit the base model.

        Called when the adapter is put on the model, so that `adapter_config.json` holds numbers. Methods whose
        settings depend on the model override it, and name them in `fits_model`.

        Args:
            layers: Layers of the `"text"` and the `"vision"` tower, where the model has them.
            length: Positions of the text tower; None where it has no such limit.
        """

    def file_shapes(self) -> dict[str, Shape]:
        """Shapes that the settings give to tensors of the weights file, by regular expressions over whole names.

        They are compared with the file before memory is asked for. Every setting that is the size of a tensor must
        stand here; None is a size that the base model decides.
        """
        return {}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the configuration, and a long class list into a file of its own.

        Args:
            save_directory: Folder.
            **kwargs: Passed to PEFT.
        """
        names = self.class_names
        is_long = len(names or ()) > MAX_LISTED_CLASSES
        self.class_names_file, self.num_class_names = (CLASSES_NAME, len(names or ())) if is_long else (None, None)
        if self.class_names_file is None:
            super().save_pretrained(str(save_directory), **kwargs)
            return
        self.class_names = None
        try:
            super().save_pretrained(str(save_directory), **kwargs)
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


def fitted(official: int, layers: int | None, *, least: int = 1) -> int:
    """A number of layers for a tower: the official one for 12 layers or more, the same share of a smaller tower.

    Args:
        official: The number for a tower of 12 layers, ViT-B's.
        layers: Layers of the tower; None where they are not known.
        least: Smallest result.
    """
    return (
        official if layers is None or layers >= OFFICIAL_LAYERS else max(least, official * layers // OFFICIAL_LAYERS)
    )


def fit_fields(config: VLMConfig, official: Mapping[str, int], fits: Mapping[str, int]) -> None:
    """Set the fields of a configuration that are None, and log those that differ from the official numbers.

    Args:
        config: Configuration of a new adapter.
        official: Numbers for ViT-B/16, by field.
        fits: Those for the model at hand.
    """
    found = {name: value for name, value in fits.items() if getattr(config, name) is None}
    for name, value in found.items():
        setattr(config, name, value)
    small = ", ".join(f"`{name}`={v} ({official[name]})" for name, v in found.items() if v != official[name])
    if small:
        logger.warning("The base model is smaller than ViT-B/16, so these settings fit it (official): %s.", small)


def read_config(
    adapter: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PeftConfig:
    """The configuration of an adapter of any method, with a class list that stands in a file of its own.

    Args:
        adapter: Local folder or Hub id.
        subfolder: Folder inside it.
        revision: Branch, tag or commit on the Hub.
        token: Token of the Hub.
    """
    return config_of(AdapterSource.find(adapter, subfolder=subfolder, revision=revision, token=token))


def config_of(source: AdapterSource) -> PeftConfig:
    """The configuration that a source holds.

    Args:
        source: Where the adapter lies.

    Raises:
        AdapterError: If it is of no kind that is known here, or holds values that cannot be.
    """
    values = source.config()
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"Expected `peft_type` in {CONFIG_NAME!r} of {source.name!r} to name a method, got {shown(kind)}. Upgrade "
            "peft_vlm and peft, or get the adapter again."
        )
    values.pop("runtime_config", None)  # PEFT's: valid in the process that wrote it only
    try:
        kind_cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        config = kind_cls.from_peft_type(**kind_cls.check_kwargs(**values))
        if not isinstance(config, VLMConfig):
            check_foreign_config(config, source.name)
        elif config.class_names_file is not None:
            config.class_names = source.class_names(config.class_names_file, config.num_class_names)
            config.__post_init__()
        return config
    except AdapterError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise AdapterError(
            f"{CONFIG_NAME!r} of {source.name!r} cannot be used: {str(error).rstrip('.')}. It is damaged, or was "
            "edited by hand: get the adapter again."
        ) from error


FACTS = (
    *("class_names", "template", "image_mean", "image_std", "image_size", "value_range"),
    *("base_architecture", "format_version", "peft_vlm_version"),
)
"""Fields of `VLMConfig` that an adapter of PEFT's own types has in a file of its own."""


def facts_of(source: AdapterSource, config: PeftConfig) -> VLMConfig:
    """What an adapter records beside its settings: classes, template, preprocessing, base model.

    Args:
        source: Where the adapter lies.
        config: Its configuration, of any type.

    Returns:
        The configuration itself where it is of this package; else what stands in `peft_vlm.json` beside it, with base
        model and revision of the configuration. Without that file every field is None.

    Raises:
        AdapterError: If the file is damaged.
    """
    if isinstance(config, VLMConfig):
        return config
    path = source.file(FACTS_NAME)
    values = {} if path is None else read_json(path)
    base = {name: getattr(config, name) for name in ("peft_type", "base_model_name_or_path", "revision")}
    try:
        if not isinstance(values, dict):
            raise ValueError(f"expected names and values, got {shown(values)}")
        return VLMConfig(**{name: values[name] for name in FACTS if name in values}, **base)
    except AdapterError:
        raise
    except (ValueError, TypeError) as error:
        raise AdapterError(
            f"{FACTS_NAME!r} of {source.name!r} cannot be used: {str(error).rstrip('.')}. It is damaged, or was "
            "edited by hand: get the adapter again."
        ) from error


def write_facts(facts: VLMConfig, config: PeftConfig, folder: Path) -> None:
    """Write `peft_vlm.json` beside a configuration that is not of this package; the configuration stays PEFT's.

    Args:
        facts: What `facts_of` will give.
        config: Configuration of the adapter.
        folder: The adapter's folder.
    """
    if facts is not config:
        write_json(folder / FACTS_NAME, {name: getattr(facts, name) for name in FACTS})


def adapter_settings(config: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter of any type that are its own, as JSON values by name.

    Args:
        config: Its configuration; of one of PEFT's the settings that are not defaults.
    """
    if isinstance(config, VLMConfig):
        return config.method_settings()
    shared = {f.name for f in fields(PeftConfig)} | {"task_type", "peft_type"}
    plain = {  # not of an instance: AdaLoRA's cannot be made without settings
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(type(config))
    }
    values = {name: value for name, value in config.to_dict().items() if name not in shared}
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in values.items()
        if value != plain.get(name) and not isinstance(value, dict)
    }


def check_weights(source: AdapterSource, config: PeftConfig) -> None:
    """Compare the weights that lie beside a configuration with it, without reading them.

    Args:
        source: Where the adapter lies.
        config: Its configuration.
    """
    if not isinstance(config, VLMConfig):
        check_foreign_weights(source.weights(), config)
        return
    saved = {rf"(.*\.)?{re.escape(name)}\..*": ... for name in config.modules_to_save or ()}
    check_header(source.weights(), config.file_shapes() | saved)


def _in_words(kind: Any) -> str:
    """A type for a message."""
    if isinstance(kind, UnionType):
        return " or ".join(_in_words(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_in_words(get_args(kind)[0]).removeprefix('an ').removeprefix('a ')}s"
    return IN_WORDS[get_origin(kind) or kind]


TOWER_FACTS = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_act"),
    *("patch_size", "image_size", "vocab_size", "max_position_embeddings"),
)
"""What decides, in each tower's configuration, whether an adapter fits."""


def architecture_of(model_config: dict[str, Any]) -> dict[str, Any]:
    """Facts that decide whether an adapter fits a base model, as JSON values.

    Args:
        model_config: `model.config.to_dict()` of the base model.
    """
    facts: dict[str, Any] = {"model_type": model_config.get("model_type")}
    for tower in ("text", "vision"):
        tower_config = model_config.get(f"{tower}_config") or {}
        facts |= {f"{tower}_{key}": tower_config[key] for key in TOWER_FACTS if key in tower_config}
    if "projection_dim" in model_config:
        facts["projection_dim"] = model_config["projection_dim"]
    return facts


def architecture_differences(config: VLMConfig, model_config: dict[str, Any]) -> list[str]:
    """Recorded facts that a base model contradicts, one text each; older adapters record fewer.

    Args:
        config: Adapter configuration; `base_architecture` is None for a new adapter.
        model_config: `model.config.to_dict()` of the base model at hand.
    """
    actual = architecture_of(model_config)
    return [
        f"{key}: adapter {value!r}, this model {actual.get(key)!r}"
        for key, value in (config.base_architecture or {}).items()
        if actual.get(key) != value
    ]


def check_architecture(config: VLMConfig, model_config: dict[str, Any]) -> None:
    """Refuse a base model whose sizes differ from the one the adapter was made for.

    Args:
        config: Adapter configuration; `base_architecture` is None for a new adapter.
        model_config: `model.config.to_dict()` of the base model at hand.

    Raises:
        AdapterError: If a size differs; the message lists each.
    """
    different = architecture_differences(config, model_config)
    if different:
        raise AdapterError(
            f"The adapter was made for another base model ({'; '.join(different)}). Load it onto "
            f"{config.base_model_name_or_path or 'the model it was trained on'!r}."
        )


@torch.no_grad()
def base_digest(model: nn.Module) -> str | None:
    """Digest of the first values of each matrix of a base model: type, number of matrices, 12 hexadecimal digits.

    Two digests say something about each other only if the first two parts are equal: half precision rounds values,
    and quantisation hides matrices.

    Args:
        model: Model without adapters.

    Returns:
        None where values are elsewhere: on `meta`, or divided among processes.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()]
    if not matrices or any(p.is_meta or isinstance(p, DTensor) or not p.numel() for p in matrices):
        return None
    # Four values each: a merged adapter or a fine-tuning changes some of them, and a large model is not read.
    values = torch.cat([p.detach().reshape(-1)[:4].float().cpu() for p in matrices])
    dtypes = "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in matrices}))
    return f"{dtypes}/{len(matrices)}/{hashlib.sha256(values.numpy().tobytes()).hexdigest()[:12]}"


def check_digest(config: VLMConfig, digest: str | None) -> None:
    """Warn where an adapter meets other weights than those it was made on.

    Args:
        config: Adapter configuration.
        digest: What `base_digest` gives for the base model at hand.
    """
    if config.base_digest is None or digest is None or config.base_digest == digest:
        return
    if config.base_digest.rpartition("/")[0] == digest.rpartition("/")[0]:
        warnings.warn(
            f"The adapter was made on other weights of the base model (digest {config.base_digest}, here {digest}): "
            f"its results are not those it was published with. Load it onto {config.base_model_name_or_path!r}"
            f"{f' at revision {config.revision!r}' if config.revision else ''}.",
            PeftVLMWarning,
            stacklevel=2,
        )
