"""A model with its tokenizer and image processor, from an adapter or a plain model, for evaluation and prediction."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import VLMConfig, check_weights, config_of
from peft_vlm.data.images import as_value_range
from peft_vlm.data.transforms import image_size_of, mean_and_std_of
from peft_vlm.errors import AdapterError, HubError, PeftVLMError, explain, explained, shown
from peft_vlm.files import CONFIG_NAME
from peft_vlm.models.repository import hub_options, is_local, why_cache_only
from peft_vlm.models.towers import towers_of


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, image processor and class names.

    Args:
        model: In evaluation mode, on its device; a `PeftModel` when there is an adapter.
        tokenizer: Of the base model.
        image_processor: Of the base model.
        base_model: Folder or id of the base model.
        base_revision: Its branch, tag or commit on the Hub; None for the main branch or a folder.
        class_names: Classes the adapter was trained on; None when it names none.
        template: Text around a class name, or several, recorded by the adapter; None when it has none.
        value_range: Black and white of training images of more than 8 bits, recorded by the adapter.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    base_model: str
    base_revision: str | None
    class_names: tuple[str, ...] | None
    template: str | tuple[str, ...] | None
    value_range: tuple[float, float] | None = None


def load_model(
    adapter: str | Path | None = None,
    *,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    base_revision: str | None = None,
) -> LoadedModel:
    """Load a base model and, where given, an adapter onto it.

    Folders are read from disk; the network is used only for what is given, or recorded by the adapter, as an id.

    Args:
        adapter: Folder or Hub id of an adapter; None for the base model alone.
        base_model: Folder or Hub id of the base model; None for the one the adapter records.
        device: Device of the model; None takes a GPU if there is one.
        dtype: Data type of the base model's weights.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Folder inside the adapter's folder or repository.
        token: Token of the Hub, for private repositories; None for the one of `hf auth login`.
        base_revision: Branch, tag or commit of the base model on the Hub, for model, tokenizer and image processor;
            None for the one the adapter records with its base model.

    Raises:
        AdapterError: If nothing is given, a folder does not exist, a part is missing or damaged, or the base model's
            image processor prepares images otherwise than the adapter was trained with.
    """
    source = None if adapter is None else _source(str(adapter), revision=revision, subfolder=subfolder, token=token)
    config = None if source is None else config_of(source)
    if source is not None and config is not None:
        check_weights(source, config)
    base = str(base_model) if base_model is not None else _recorded_base(adapter, config)
    _check_path(base, what="base model", advice="Pass `base_model=` with a folder or the id of the model.")
    if base_revision is None and config is not None and base == config.base_model_name_or_path:
        base_revision = config.revision
    model, tokenizer, processor = _load_base(base, dtype, token, base_revision)
    towers_of(model)  # refuses other architectures before an adapter is put onto them
    if source is not None:
        _check_processor(config, processor, base)
        model = _with_adapter(model, source)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recorded = config if isinstance(config, VLMConfig) else None
    names = None if recorded is None or recorded.class_names is None else tuple(recorded.class_names)
    template = None if recorded is None else _as_template(recorded.template)
    value_range = None if recorded is None else as_value_range(recorded.value_range)
    model = model.eval().to(target)
    return LoadedModel(model, tokenizer, processor, base, base_revision, names, template, value_range)


def _source(adapter: str, **where: str | None) -> AdapterSource:
    """Where an adapter is read from."""
    _check_path(adapter, what="adapter", advice="Pass the folder that holds `adapter_config.json`, or a Hub id.")
    return AdapterSource.find(adapter, **where)


def _load_base(base: str, dtype: torch.dtype, token: str | None, revision: str | None) -> tuple[nn.Module, Any, Any]:
    """Model, tokenizer and image processor of a base model."""
    if Path(base, CONFIG_NAME).exists():
        raise AdapterError(f"Expected a base model, got the adapter {base!r}. Pass `base_model=` with its base model.")
    options = hub_options(base, token=token, revision=revision)
    # transformers looks for an adapter in the repository, too, and asks the Hub for it unless it is told twice
    twice = {"adapter_kwargs": {"local_files_only": options["local_files_only"]}}
    try:
        model: nn.Module = AutoModel.from_pretrained(base, dtype=dtype, **options, **twice)
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        return model, tokenizer, AutoImageProcessor.from_pretrained(base, **options)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if options["local_files_only"] and not is_local(base):
            raise HubError(f"The base model {base!r} cannot be read: {why_cache_only()}.") from error
        raise AdapterError(
            f"The base model {base!r} could not be loaded with tokenizer and image processor: "
            f"{explain(error) or f'{error}.'} "
            "Pass `base_model=` with a folder or id that holds all three."
        ) from error


def _with_adapter(model: nn.Module, source: AdapterSource) -> PeftModel:
    """A base model with the adapter of a source, whose files were checked."""
    what = f"The adapter {source.name!r}"
    try:
        with explained(f"{what} could not be loaded"):
            return PeftModel.from_pretrained(model, str(source.folder()))
    except PeftVLMError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, re.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise AdapterError(
            f"{what} could not be put onto its base model ({shown(reason, 400)}). Its files do not belong "
            "together, or to another base model: get the adapter again, or pass `base_model=`."
        ) from error


def _recorded_base(adapter: str | Path | None, config: PeftConfig | None) -> str:
    if config is None:
        raise AdapterError("Expected an adapter or a base model, got neither.")
    if not config.base_model_name_or_path:
        raise AdapterError(f"The adapter {str(adapter)!r} records no base model. Pass `base_model=`.")
    return config.base_model_name_or_path


def _check_path(name: str, *, what: str, advice: str) -> None:
    if is_local(name) and not Path(name).exists():
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
