"""A model with its tokenizer and image processor, from an adapter or a plain model, for evaluation and prediction."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
)

from peft_vlm.adapters.config import VLMConfig, read_config
from peft_vlm.data.transforms import image_size_of, mean_and_std_of
from peft_vlm.errors import AdapterError, explain, explained
from peft_vlm.models.towers import towers_of


@dataclass(frozen=True)
class LoadedModel:
    """What an adapter folder and its base model hold together.

    Args:
        model: In evaluation mode, on its device; a `PeftModel` when there is an adapter.
        tokenizer: Of the base model.
        image_processor: Of the base model.
        base_model: Where the base model came from.
        class_names: Classes the adapter was trained on; None when it names none.
        template: Text around a class name, or several, recorded by the adapter; None when it has none.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    base_model: str
    class_names: tuple[str, ...] | None
    template: str | tuple[str, ...] | None


def load_model(
    adapter: str | Path | None = None,
    *,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> LoadedModel:
    """Load a base model and, where given, an adapter onto it.

    Folders are read from disk; the network is used only for what is given, or recorded by the adapter, as an id.

    Args:
        adapter: Folder or Hub id of an adapter; None for the base model alone.
        base_model: Folder or Hub id of the base model; None for the one the adapter records.
        device: Where the model runs; None takes a GPU if there is one.
        dtype: Data type of the base model's weights.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Folder inside the adapter's folder or repository.
        token: Token of the Hub, for private repositories; None for the one of `hf auth login`.

    Raises:
        AdapterError: If nothing is given, a folder does not exist, a part is missing, or the base model's image
            processor prepares images otherwise than the adapter was trained with.
    """
    source = {"revision": revision, "subfolder": subfolder, "token": token}
    config = None if adapter is None else _read_config(str(adapter), **source)
    base = str(base_model) if base_model is not None else _recorded_base(adapter, config)
    _check_path(base, what="base model", advice="Pass `base_model=` with a folder or the id of the model.")
    try:
        model: nn.Module = AutoModel.from_pretrained(base, dtype=dtype, token=token)
        tokenizer = AutoTokenizer.from_pretrained(base, token=token)
        processor = AutoImageProcessor.from_pretrained(base, token=token)
    except OSError as error:
        raise AdapterError(
            f"The base model {base!r} could not be loaded with tokenizer and image processor: "
            f"{explain(error) or f'{error}.'} "
            "Pass `base_model=` with a folder or id that holds all three."
        ) from error
    towers_of(model)  # refuses other architectures before an adapter is put onto them
    if adapter is not None:
        _check_processor(config, processor, base)
        with explained(f"The adapter {str(adapter)!r} could not be loaded"):
            model = PeftModel.from_pretrained(model, str(adapter), **source)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recorded = config if isinstance(config, VLMConfig) else None
    names = None if recorded is None or recorded.class_names is None else tuple(recorded.class_names)
    template = None if recorded is None else _as_template(recorded.template)
    return LoadedModel(model.eval().to(target), tokenizer, processor, base, names, template)


def _read_config(adapter: str, **source: str | None) -> PeftConfig:
    _check_path(adapter, what="adapter", advice="Pass the folder that holds `adapter_config.json`, or a Hub id.")
    try:
        return read_config(adapter, **source)
    except AdapterError:
        raise
    except (OSError, ValueError) as error:
        reason = explain(error) or str(error)
        raise AdapterError(f"{adapter!r} holds no adapter that can be read: {reason}") from error


def _recorded_base(adapter: str | Path | None, config: PeftConfig | None) -> str:
    if config is None:
        raise AdapterError("Expected an adapter or a base model, got neither.")
    if not config.base_model_name_or_path:
        raise AdapterError(f"The adapter {str(adapter)!r} records no base model. Pass `base_model=`.")
    return config.base_model_name_or_path


def _check_path(name: str, *, what: str, advice: str) -> None:
    # A Hub id is `name` or `owner/name`; everything else can only be a path, and must not reach the network.
    if not Path(name).exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise AdapterError(f"The {what} {name!r} does not exist (looked in {str(Path.cwd())!r}). {advice}")


def _check_processor(config: PeftConfig | None, processor: BaseImageProcessor, base: str) -> None:
    if not isinstance(config, VLMConfig) or config.image_mean is None:
        return
    mean, std = mean_and_std_of(processor)
    here = {"image_mean": list(mean), "image_std": list(std), "image_size": list(image_size_of(processor))}
    there = {name: getattr(config, name) for name in here}
    if here != there:
        raise AdapterError(
            f"The adapter was trained on images prepared with {there!r}; the image processor of {base!r} prepares "
            f"them with {here!r}. Pass `base_model=` with the processor of the training."
        )


def _as_template(template: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return template if template is None or isinstance(template, str) else tuple(template)
