"""An evaluation from start to finish: load, classify, write the report and the plots."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.folders import split_of
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.overlap import check_not_trained_on, is_chosen_on
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.evaluation import protocols
from peft_vlm.evaluation.classify import EvalResult, TextClassifier
from peft_vlm.evaluation.loading import LoadedModel, load_model
from peft_vlm.evaluation.plots import bars_png, confusion_matrix_png, require_matplotlib
from peft_vlm.evaluation.protocols import ProtocolResult
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.files import BASELINE_NAME, REPORT_NAME, SUMMARY_NAME, file_name, last_part, read_json, weights_sha256
from peft_vlm.settings import EvaluationArguments
from peft_vlm.text.prompts import readable

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
    """Evaluate and write `report.json`, `scores.png`, one `confusion_<part>.png` per part, `predictions.csv`, and with
    `baseline` also `zero_shot.json`. The command renders the adapter's card again (`peft_vlm.hub.write_card`).

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
    template = tuple(arguments.template or ()) or loaded.template or "a photo of a {}."
    report, result = _evaluate(arguments, loaded, datasets, template, num_base)
    report = replace(report, selected_on_test=selected_on_test)
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
    template: str | tuple[str, ...],
    num_base: int | None,
) -> tuple[EvalReport, ProtocolResult]:
    classifier = TextClassifier(loaded.model, loaded.tokenizer, template=template)
    options: dict[str, Any] = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    options["progress"] = True
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


def _load_datasets(arguments: EvaluationArguments, loaded: LoadedModel) -> dict[str, ImageClassificationDataset]:
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("image_column", "label_column", "class_names")
    }
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


def _check_new(arguments: EvaluationArguments, datasets: Mapping[str, ImageClassificationDataset]) -> bool:
    """Compare the test images with those that the adapter's summary remembers; True if its checkpoint was chosen on
    them.
    """
    path = Path(arguments.adapter or "") / SUMMARY_NAME
    if arguments.adapter is None or not path.is_file():
        return False
    summary = read_json(path)
    data, selection = summary.get("training_images") or {}, summary.get("selection") or {}
    refuse = not any(split_of(split) == "train" for split in arguments.split)  # asked for by its name
    for dataset in datasets.values():
        check_not_trained_on(dataset, data.get("sample", []), num_train=data.get("count", 0), refuse=refuse)
    return any(is_chosen_on(dataset, selection.get("sample", [])) for dataset in datasets.values())


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
    known = {readable(class_name) for class_name in trained}
    others = [class_name for class_name in dataset.class_names if readable(class_name) not in known]
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
        path = folder / f"confusion_{file_name(part)}.png"
        confusion_matrix_png(
            evaluated.confusion, evaluated.class_names, path, title=f"{name}: {report.protocol}, {part}"
        )


def _write_predictions(parts: dict[str, EvalResult], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "position", "label", "predicted", "confidence"])
        for part, result in parts.items():
            rows = zip(result.labels.tolist(), result.predicted.tolist(), result.confidence.tolist(), strict=True)
            for position, (label, predicted, confidence) in enumerate(rows):
                names = result.class_names[label], result.class_names[predicted]
                writer.writerow([part, position, *names, f"{confidence:.6f}"])
