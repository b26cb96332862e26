"""An evaluation from start to finish: load model and data, classify, write the report and the plots."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
)

from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import VLMConfig, check_architecture, check_weights, config_of, facts_of
from peft_vlm.data.benchmarks import template_for
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.folders import split_of
from peft_vlm.data.images import as_value_range
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.splits import check_not_trained_on, is_chosen_on
from peft_vlm.data.transforms import EvalTransform, image_size_of, mean_and_std_of
from peft_vlm.errors import (
    AdapterError,
    ClassNameError,
    DataError,
    HubError,
    PeftVLMError,
    UnsupportedModelError,
    explain,
    explained,
    shown,
)
from peft_vlm.evaluation import protocols
from peft_vlm.evaluation.classify import EvalResult, TextClassifier
from peft_vlm.evaluation.plots import bars_png, confusion_matrix_png, reliability_png, require_matplotlib
from peft_vlm.evaluation.protocols import ProtocolResult
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.files import (
    BASELINE_NAME,
    CONFIG_NAME,
    REPORT_NAME,
    file_name,
    last_part,
    read_summary,
    weights_sha256,
    write_bytes,
)
from peft_vlm.models.repository import hub_options, is_local, why_cache_only
from peft_vlm.models.towers import check_base_config, towers_of
from peft_vlm.serving.escape import spreadsheet_cell
from peft_vlm.settings import EvaluationArguments
from peft_vlm.text.prompts import places_of


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
    check_path(base, what="base model", advice="Pass `base_model=` with a folder or the id of the model.")
    if base_revision is None and config is not None and base == config.base_model_name_or_path:
        base_revision = config.revision
    model, tokenizer, processor = _load_base(base, dtype, token, base_revision)
    towers_of(model)  # refuses other architectures before an adapter is put onto them
    facts = None if source is None or config is None else facts_of(source, config)
    if source is not None and facts is not None:
        check_architecture(facts, model.config.to_dict())
        _check_processor(facts, processor, base)
        model = _with_adapter(model, source)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = None if facts is None or facts.class_names is None else tuple(facts.class_names)
    template = None if facts is None else _as_template(facts.template)
    value_range = None if facts is None else as_value_range(facts.value_range)
    model = model.eval().to(target)
    return LoadedModel(model, tokenizer, processor, base, base_revision, names, template, value_range)


def _source(adapter: str, **where: str | None) -> AdapterSource:
    """Where an adapter is read from."""
    check_path(adapter, what="adapter", advice="Pass the folder that holds `adapter_config.json`, or a Hub id.")
    return AdapterSource.find(adapter, **where)


#: What damaged files of a base model raise beside the usual errors.
DAMAGED = (SafetensorError, StrictDataclassError)


def _load_base(base: str, dtype: torch.dtype, token: str | None, revision: str | None) -> tuple[nn.Module, Any, Any]:
    """Model, tokenizer and image processor of a base model."""
    if Path(base, CONFIG_NAME).exists():
        raise AdapterError(f"Expected a base model, got the adapter {base!r}. Pass `base_model=` with its base model.")
    if Path(base).is_dir() and (odd := [p.name for p in Path(base).iterdir() if not p.is_file() and not p.is_dir()]):
        raise AdapterError(
            f"Expected files in the base model {base!r}, got {shown(odd)}, which are none. Remove them."
        )
    options = hub_options(base, token=token, revision=revision)
    # transformers looks for an adapter in the repository, too, and asks the Hub for it unless it is told twice
    twice = {"adapter_kwargs": {"local_files_only": options["local_files_only"]}}
    try:
        check_base_config(AutoConfig.from_pretrained(base, **options))
        model: nn.Module = AutoModel.from_pretrained(base, dtype=dtype, **options, **twice)
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        return model, tokenizer, AutoImageProcessor.from_pretrained(base, **options)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, *DAMAGED) as error:
        if options["local_files_only"] and not is_local(base):
            raise HubError(
                f"The base model {base!r} is no folder here and cannot be read: {why_cache_only()}."
            ) from error
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


def check_path(name: str, *, what: str, advice: str) -> None:
    """Refuse a folder that does not exist before the Hub is asked for a repository of its name.

    Args:
        name: Folder or Hub id.
        what: What is looked for, for the message.
        advice: What to do, for the message.

    Raises:
        AdapterError: If it can only be a folder, and there is none.
    """
    if is_local(name) and not Path(name).exists():
        raise AdapterError(f"The {what} {name!r} does not exist (looked in {str(Path.cwd())!r}). {advice}")


def _check_processor(config: VLMConfig, processor: BaseImageProcessor, base: str) -> None:
    if config.image_mean is None:
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


#: Protocols on one dataset, and on several named ones.
SINGLE: dict[str, Callable[..., ProtocolResult]] = {
    "zero-shot": protocols.zero_shot,
    "few-shot": protocols.few_shot,
    "base-to-new": protocols.base_to_new,
}
SEVERAL: dict[str, Callable[..., ProtocolResult]] = {
    "cross-dataset": protocols.cross_dataset,
    "domain-shift": protocols.domain_shift,
}


def run_evaluation(arguments: EvaluationArguments) -> EvalReport:
    """Evaluate and write `report.json`, `scores.png`, `confusion_<part>.png` and `reliability_<part>.png`, the table
    `predictions.csv`, and with `baseline` also `zero_shot.json`. The command renders the adapter's card again
    (`peft_vlm.hub.write_card`).

    Args:
        arguments: Settings.

    Returns:
        The report that was written.

    Raises:
        DataError: If the protocol does not fit the number of datasets.
        ValueError: If the protocol is unknown.
    """
    arguments.check()
    if arguments.plots:
        require_matplotlib()
    loaded = load_model(arguments.adapter, base_model=arguments.model, device=arguments.device)
    datasets = _load_datasets(arguments, loaded)
    selected_on_test = _check_new(arguments, datasets)
    datasets, num_base = _with_trained_classes(arguments.protocol, loaded.class_names, datasets)
    template = tuple(arguments.template or ()) or loaded.template or _own_templates(arguments)
    report, result = _evaluate(arguments, loaded, datasets, template, num_base)
    shares = {dataset.holdout for dataset in datasets.values()} - {0.0}
    drawn = [f"Test images: {share:.0%} of each class of images without parts, drawn by seed 0." for share in shares]
    note = " ".join(filter(None, (report.note, *drawn)))
    report = replace(report, selected_on_test=selected_on_test, note=note)
    _write(report, result, arguments)
    if arguments.baseline:
        base = load_model(base_model=loaded.base_model, base_revision=loaded.base_revision, device=arguments.device)
        alone = replace(arguments, adapter=None, shots=None, seed=None, note="")
        _evaluate(alone, base, datasets, template, num_base)[0].save(Path(arguments.output_dir) / BASELINE_NAME)
    return report


def _evaluate(
    arguments: EvaluationArguments,
    loaded: LoadedModel,
    datasets: dict[str, ImageClassificationDataset],
    template: str | tuple[str, ...] | dict[str, str],
    num_base: int | None,
) -> tuple[EvalReport, ProtocolResult]:
    options: dict[str, Any] = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    options["progress"] = True
    if isinstance(template, dict):
        options["templates"], template = template, tuple(dict.fromkeys(template.values()))
    classifier = TextClassifier(loaded.model, loaded.tokenizer, template=template)
    if num_base is not None:
        options["num_base"] = num_base
    if arguments.source_domain is not None:
        options["source"] = arguments.source_domain
    if arguments.protocol in SINGLE:
        result = SINGLE[arguments.protocol](classifier, *datasets.values(), **options)
    else:
        result = SEVERAL[arguments.protocol](classifier, datasets, **options)
    report = EvalReport.from_result(
        result,
        model=loaded.base_model,
        adapter=arguments.adapter,
        dataset=f"{', '.join(arguments.dataset)} ({', '.join(arguments.split)})",
        template=(template,) if isinstance(template, str) else template,
        adapter_sha256=None if arguments.adapter is None else weights_sha256(Path(arguments.adapter)),
        **{name: getattr(arguments, name) for name in ("shots", "seed", "note")},
    )
    return report, result


def _own_templates(arguments: EvaluationArguments) -> str | dict[str, str]:
    """What a model without adapter is asked with: for several benchmarks the template of each."""
    if arguments.data_root is None or arguments.protocol in SINGLE:
        return template_for(arguments.dataset[0], arguments.data_root)
    return {name: template_for(name, arguments.data_root) for name in arguments.dataset}


def _load_datasets(arguments: EvaluationArguments, loaded: LoadedModel) -> dict[str, ImageClassificationDataset]:
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("image_column", "label_column", "class_names", "data_root")
    }
    options |= {"config_name": arguments.dataset_config, "revision": arguments.dataset_revision}
    options["holdout"] = _holdout(arguments)
    options["transform"] = EvalTransform(loaded.image_processor)
    options["value_range"] = loaded.value_range if arguments.value_range is None else arguments.value_range
    if len(arguments.split) > 1:
        return {split: load_image_dataset(arguments.dataset[0], split=split, **options) for split in arguments.split}
    split = arguments.split[0]
    datasets = {Path(source).stem: load_image_dataset(source, split=split, **options) for source in arguments.dataset}
    if len(datasets) != len(arguments.dataset):
        raise DataError(f"Expected datasets with different last parts of their paths, got {arguments.dataset!r}.")
    if arguments.domain_column:
        (dataset,) = datasets.values()
        return dataset.group_by(arguments.domain_column)
    return datasets


def _holdout(arguments: EvaluationArguments) -> float:
    """The share that the training has kept for its test, unless another is given."""
    if arguments.holdout is not None:
        return arguments.holdout
    summary = None if arguments.adapter is None else read_summary(Path(arguments.adapter))
    if summary is None or arguments.split != ["test"]:
        return 0.0
    return float((summary.get("data") or {}).get("holdout", 0.0))


def _check_new(arguments: EvaluationArguments, datasets: Mapping[str, ImageClassificationDataset]) -> bool:
    """Compare the test images with those that the adapter's summary remembers; True if its checkpoint was chosen on
    them.
    """
    summary = None if arguments.adapter is None else read_summary(Path(arguments.adapter))
    if summary is None:
        return False
    data, selection = summary.get("training_images") or {}, summary.get("selection") or {}
    refuse = not any(split_of(split) == "train" for split in arguments.split)  # asked for by its name
    refuse = refuse and not (summary.get("objective") or {}).get(
        "transductive"
    )  # seen without labels; the card says so
    for dataset in datasets.values():
        check_not_trained_on(dataset, data.get("sample") or [], num_train=data.get("count") or 0, refuse=refuse)
    return any(is_chosen_on(dataset, selection.get("sample") or []) for dataset in datasets.values())


def _with_trained_classes(
    protocol: str, trained: tuple[str, ...] | None, datasets: dict[str, ImageClassificationDataset]
) -> tuple[dict[str, ImageClassificationDataset], int | None]:
    """The datasets with labels among the classes that the adapter records, and how many of them are base classes.

    Raises:
        ClassNameError: If the protocol is about the trained classes, and the images show others.
    """
    if trained is None or protocol not in ("few-shot", "base-to-new"):
        return datasets, None
    ((name, dataset),) = datasets.items()
    places = places_of(dataset.class_names, trained)
    others = [class_name for class_name, place in zip(dataset.class_names, places, strict=True) if place is None]
    if others and (protocol == "few-shot" or len(others) == len(dataset.class_names)):
        raise ClassNameError(
            f"Expected images of the {len(trained)} classes that the adapter was trained on, got {len(others)} other "
            f"classes, the first is {others[0]!r}. Pass the class names of the training, or evaluate other classes "
            "with the protocol 'zero-shot' or 'cross-dataset'."
        )
    return {name: dataset.with_class_names((*trained, *others))}, len(trained) if others else None


def _write(report: EvalReport, result: ProtocolResult, arguments: EvaluationArguments) -> None:
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / REPORT_NAME)
    if arguments.save_predictions:
        _write_predictions(result.parts, folder / "predictions.csv")
    if not arguments.plots:
        return
    name = last_part(arguments.adapter or report.model)
    datasets = ", ".join(last_part(source) for source in arguments.dataset)
    bars_png({name: report.scores}, folder / "scores.png", title=f"{name}: {report.protocol}, {datasets}")
    for part, evaluated in result.parts.items():
        title, end = f"{name}: {report.protocol}, {part}", f"{file_name(part)}.png"
        confusion_matrix_png(evaluated.confusion, evaluated.class_names, folder / f"confusion_{end}", title=title)
        correct = evaluated.predicted == evaluated.labels
        reliability_png(evaluated.confidence, correct, folder / f"reliability_{end}", title=title)


def _write_predictions(parts: dict[str, EvalResult], path: Path) -> None:
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "position", "label", "predicted", "confidence", "file"])
        for part, result in parts.items():
            rows = zip(result.labels.tolist(), result.predicted.tolist(), result.confidence.tolist(), strict=True)
            for position, (label, predicted, confidence) in enumerate(rows):
                names = result.class_names[label], result.class_names[predicted]
                image = "" if result.images is None else result.images.path_of(position)
                cells = [spreadsheet_cell(cell) for cell in (part, position, *names)]
                writer.writerow([*cells, f"{confidence:.6f}", spreadsheet_cell(image)])
        write_bytes(path, file.getvalue().encode(errors="backslashreplace"))
