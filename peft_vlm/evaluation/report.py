"""Evaluation results as JSON, and their summary over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_vlm.errors import AdapterError, DataError, shown
from peft_vlm.evaluation.classify import EvalResult
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.evaluation.protocols import ProtocolResult
from peft_vlm.files import is_of, read_json, write_json


@dataclass(frozen=True)
class EvalReport:
    """One evaluation with everything needed to understand and repeat it; written as JSON.

    Args:
        protocol: `"zero-shot"`, `"few-shot"`, `"base-to-new"`, `"cross-dataset"` or `"domain-shift"`.
        model: Folder or id of the base model.
        adapter: Folder or id of the adapter; None for the base model alone.
        dataset: Source and split of each part.
        template: Texts around the class names that were used.
        scores: Accuracies in percent by name.
        parts: Per evaluated set: images, classes, accuracies, calibration error.
        shots: Training images per class; None where nothing was trained or all were used.
        seed: Seed of shots and training; None where nothing was trained.
        note: Remark for readers, for example that unlabelled test images were used (transductive).
        adapter_sha256: SHA-256 of the adapter's weights file, where the adapter is a local folder.
        selected_on_test: The checkpoint was chosen on these images: the scores are higher than on new ones.
        versions: Versions of the packages involved.
    """

    protocol: str
    model: str
    adapter: str | None
    dataset: str
    template: tuple[str, ...]
    scores: dict[str, float]
    parts: dict[str, dict[str, Any]]
    shots: int | None = None
    seed: int | None = None
    note: str = ""
    adapter_sha256: str | None = None
    selected_on_test: bool = False
    versions: dict[str, str] = field(
        default_factory=lambda: {n: version(n) for n in ("torch", "transformers", "peft")}
    )

    @classmethod
    def from_result(cls, result: ProtocolResult, **facts: Any) -> "EvalReport":
        """The report of a protocol's outcome.

        Args:
            result: Outcome.
            **facts: The other fields: model, adapter, dataset, template, shots, seed, note, adapter_sha256.
        """
        parts = {name: describe(part) for name, part in result.parts.items()}
        return cls(protocol=result.protocol, scores=result.scores, parts=parts, **facts)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON.

        Args:
            path: File to write; its folder must exist.
        """
        write_json(Path(path), asdict(self), allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> "EvalReport":
        """Read a report.

        Args:
            path: File that `save` wrote.

        Raises:
            DataError: If the file holds something else.
        """
        try:
            values = checked_fields(cls, read_json(Path(path)))
            counts = [part.get("num_images") for part in values["parts"].values()]
            if not values["scores"] or not is_of(counts, list[int]):
                raise TypeError("it has no scores, or a part without `num_images`")
            return cls(**{**values, "template": tuple(values["template"])})
        except (TypeError, KeyError, AdapterError) as error:
            raise DataError(f"Expected {str(path)!r} to be an evaluation report of peft_vlm; {error}.") from error


def checked_fields(cls: Any, values: Any) -> dict[str, Any]:
    """Values of a dataclass out of a file, refused where they are of other types than its fields.

    Args:
        cls: The dataclass.
        values: JSON value.

    Raises:
        TypeError: Naming the first.
    """
    if not isinstance(values, dict):
        raise TypeError(f"it holds {shown(values)}")
    for part in fields(cls):
        if part.name in values and not is_of(values[part.name], part.type):
            raise TypeError(f"`{part.name}` is {shown(values[part.name])}")
    return values


def describe(result: EvalResult) -> dict[str, Any]:
    """Scores of one evaluated set as JSON values; accuracies in percent, calibration error in [0, 1]."""
    return {
        "num_images": result.num_images,
        "num_classes": len(result.class_names),
        "accuracy": result.accuracy,
        "mean_class_accuracy": result.mean_class_accuracy,
        "expected_calibration_error": result.ece,
        "per_class_accuracy": result.per_class,
    }


@dataclass(frozen=True)
class Summary:
    """Scores over seeds.

    Args:
        mean: Mean of each score; `h` is the harmonic mean of the mean base and the mean new accuracy.
        std: Sample standard deviation (`n - 1`) of each score over the seeds; None for a single seed.
        num_seeds: Number of runs.
    """

    mean: dict[str, float]
    std: dict[str, float | None]
    num_seeds: int


def summarize(runs: Sequence[Mapping[str, float]]) -> Summary:
    """Mean and spread of the scores of several seeds.

    Args:
        runs: Scores of each seed, all with the same names.

    Raises:
        DataError: If there is no run, or the names differ.
    """
    if not runs or any(set(run) != set(runs[0]) for run in runs):
        raise DataError(f"Expected runs with the same scores, got {[sorted(run) for run in runs]!r}.")
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    if "h" in means:
        means["h"] = harmonic_mean(means["base"], means["new"])
    return Summary(means, {name: _std(values) for name, values in columns.items()}, len(runs))


@dataclass(frozen=True)
class PairedDifference:
    """Gain of one method over another on the same seeds.

    Args:
        mean: Mean of the differences.
        std: Their sample standard deviation (`n - 1`), the spread that results are quoted with; None for one seed.
        standard_error: `std / sqrt(n)`; None for one seed.
        num_seeds: Number of pairs.
    """

    mean: float
    std: float | None
    standard_error: float | None
    num_seeds: int


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Difference to a baseline, seed by seed.

    Runs of one seed share their training images, so that the spread of the differences is free of the luck of the
    draw, which the spread of the scores is not.

    Args:
        scores: One score per seed.
        baseline: The baseline's scores on the same seeds, in the same order.

    Raises:
        DataError: If the numbers of seeds differ, or there is none.
    """
    if len(scores) != len(baseline) or not scores:
        raise DataError(f"Expected the same number of seeds, at least 1, got {len(scores)} and {len(baseline)}.")
    differences = [score - reference for score, reference in zip(scores, baseline, strict=True)]
    std = _std(differences)
    standard_error = None if std is None else std / len(differences) ** 0.5
    return PairedDifference(statistics.fmean(differences), std, standard_error, len(differences))


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
