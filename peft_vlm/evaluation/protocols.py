"""The evaluation protocols of the field as functions: a classifier and test images in, scores and predictions out.

Training is not their business: which images a classifier was trained on is decided with `peft_vlm.data` (`few_shot`,
`base_to_new_split`) before. All scores are in percent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.splits import base_and_new_classes
from peft_vlm.errors import DataError
from peft_vlm.evaluation.classify import EvalResult, ImageClassifier, classify
from peft_vlm.evaluation.metrics import harmonic_mean


@dataclass(frozen=True, eq=False)
class ProtocolResult:
    """Result of one protocol.

    Args:
        protocol: Name, such as `"base-to-new"`.
        scores: Accuracies in percent by name, for example `base`, `new` and `h`.
        parts: Per-image predictions of each evaluated set.
    """

    protocol: str
    scores: dict[str, float]
    parts: dict[str, EvalResult]


def zero_shot(classifier: ImageClassifier, test: ImageClassificationDataset, **options: int | bool) -> ProtocolResult:
    """Accuracy over all classes.

    Args:
        classifier: Any classifier; for a zero-shot number one that has seen no image of the dataset.
        test: Test images.
        **options: Passed to `classify.iterate_logits`.
    """
    return _on_all_classes("zero-shot", classifier, test, **options)


def few_shot(classifier: ImageClassifier, test: ImageClassificationDataset, **options: int | bool) -> ProtocolResult:
    """Accuracy over all classes of a classifier trained on a few images of each.

    Args:
        classifier: Trained on `few_shot(train, shots=..., seed=...)` of all classes.
        test: Test images.
        **options: Passed to `classify.iterate_logits`.
    """
    return _on_all_classes("few-shot", classifier, test, **options)


def base_to_new(
    classifier: ImageClassifier,
    test: ImageClassificationDataset,
    *,
    num_base: int | None = None,
    **options: int | bool,
) -> ProtocolResult:
    """Base accuracy, new accuracy and their harmonic mean; each half is tested with its own class names only.

    Args:
        classifier: Trained on images of the base classes, which are the first half of the classes, rounded up.
        test: Test images of all classes.
        num_base: Number of base classes, where they are not half of the classes.
        **options: Passed to `classify.iterate_logits`.

    References:
        Conditional Prompt Learning for Vision-Language Models, 2022, arXiv 2203.05557, Sec. 4.1.
    """
    base, new = base_and_new_classes(len(test.class_names))
    if num_base is not None:
        base, new = (base + new)[:num_base], (base + new)[num_base:]
    halves = {"base": base, "new": new}
    parts = {}
    for name, class_ids in halves.items():
        half = test.restrict(class_ids)
        parts[name] = classify(classifier.logits_for(half.class_names), half, **options)
    scores = {name: part.accuracy for name, part in parts.items()}
    return ProtocolResult("base-to-new", {**scores, "h": harmonic_mean(scores["base"], scores["new"])}, parts)


def cross_dataset(
    classifier: ImageClassifier,
    targets: Mapping[str, ImageClassificationDataset],
    *,
    source: str | None = None,
    templates: Mapping[str, str | Sequence[str]] | None = None,
    **options: int | bool,
) -> ProtocolResult:
    """Accuracy on other datasets, each with its own classes and, where given, its own template; and their average.

    Args:
        classifier: Trained on a source dataset.
        targets: Test images by dataset name.
        source: The dataset of the training images, where it is among the targets; left out of the average.
        templates: Template by dataset name; the classifier's own for the others.
        **options: Passed to `classify.iterate_logits`.
    """
    return _on_targets("cross-dataset", classifier, targets, templates, source=source, **options)


def domain_shift(
    classifier: ImageClassifier,
    targets: Mapping[str, ImageClassificationDataset],
    *,
    source: str | None = None,
    templates: Mapping[str, str | Sequence[str]] | None = None,
    **options: int | bool,
) -> ProtocolResult:
    """Accuracy on the same task in other domains (sketches, pixel art, ...), and the average over them.

    A domain may have a part of the classes, as ImageNet-A and -R have: it is scored over its own class names.

    Args:
        classifier: Trained on the source domain.
        targets: Test images by domain.
        source: The domain of the training images, where it is among the targets; left out of the average.
        templates: Template by domain; the classifier's own for the others.
        **options: Passed to `classify.iterate_logits`.
    """
    return _on_targets("domain-shift", classifier, targets, templates, source=source, **options)


def _on_all_classes(
    protocol: str, classifier: ImageClassifier, test: ImageClassificationDataset, **options: int | bool
) -> ProtocolResult:
    result = classify(classifier.logits_for(test.class_names), test, **options)
    return ProtocolResult(protocol, {"accuracy": result.accuracy}, {"all": result})


def _on_targets(
    protocol: str,
    classifier: ImageClassifier,
    targets: Mapping[str, ImageClassificationDataset],
    templates: Mapping[str, str | Sequence[str]] | None,
    source: str | None = None,
    **options: int | bool,
) -> ProtocolResult:
    if not targets or "average" in targets:
        raise DataError(f"Expected named target datasets, none of them called 'average', got {list(targets)!r}.")
    unknown = sorted(set(templates or {}) - set(targets))
    if unknown:
        raise DataError(f"Expected templates for the targets {list(targets)!r}, got some for {unknown!r}.")
    averaged = [name for name in targets if name != source]
    if not averaged or (source is not None and source not in targets):
        raise DataError(f"Expected `source` to be one of several targets {list(targets)!r}, got {source!r}.")
    parts = {}
    for name, dataset in targets.items():
        logits = classifier.logits_for(dataset.class_names, template=(templates or {}).get(name))
        parts[name] = classify(logits, dataset, **options)
    scores = {name: part.accuracy for name, part in parts.items()}
    return ProtocolResult(protocol, {**scores, "average": fmean(scores[name] for name in averaged)}, parts)
