"""Metrics against scikit-learn and hand-computed numbers; the `evaluate` modules load without any network."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from peft_vlm.evaluation import metrics
from peft_vlm.evaluation.evaluate_metrics import (
    Accuracy,
    ExpectedCalibrationError,
    HarmonicMean,
    PerClassAccuracy,
    metric_path,
)

CLASSES = 7


@pytest.fixture
def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    """500 predictions and labels over seven classes; the last has no image."""
    labels = torch.randint(0, CLASSES - 1, (500,))
    predicted = torch.where(torch.rand(500) < 0.6, labels, torch.randint(0, CLASSES, (500,)))
    return predicted, labels


def test_accuracy_equals_scikit_learn(labelled: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Percent, not a share."""
    predicted, labels = labelled
    assert metrics.accuracy(predicted, labels) == pytest.approx(100 * accuracy_score(labels, predicted), abs=1e-12)


def test_confusion_matrix_equals_scikit_learn(labelled: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Rows are true classes; a transposed matrix looks just as plausible."""
    predicted, labels = labelled
    expected = confusion_matrix(labels, predicted, labels=range(CLASSES))
    assert metrics.confusion_matrix(predicted, labels, num_classes=CLASSES).tolist() == expected.tolist()


def test_per_class_accuracy_equals_scikit_learns_recall(labelled: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A class without images has no accuracy; 0 would lower the mean."""
    predicted, labels = labelled
    values = metrics.per_class_accuracy(predicted, labels, num_classes=CLASSES)
    expected = 100 * recall_score(labels, predicted, labels=range(CLASSES - 1), average=None)
    assert values[:-1].tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert values[-1].isnan()


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [(86.96, 80.73, 83.73), (82.69, 63.22, 71.66), (50.0, 50.0, 50.0), (0.0, 50.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_harmonic_mean_gives_the_published_values(base: float, new: float, expected: float) -> None:
    """Averages of PromptKD (arXiv 2403.02781, Table 1) and CoOp; two zeros must not divide by zero."""
    assert metrics.harmonic_mean(base, new) == pytest.approx(expected, abs=0.005)


def test_negative_accuracies_have_no_harmonic_mean() -> None:
    """A sign error upstream would give a plausible number."""
    with pytest.raises(ValueError, match=r"at least 0, got -1.0 and 50.0"):
        metrics.harmonic_mean(-1.0, 50.0)


def calibration_by_bins(confidence: list[float], correct: list[bool], num_bins: int) -> float:
    """Eq. 3 of arXiv 1706.04599 with its interval notation ((m-1)/M, m/M]."""
    total = 0.0
    for number in range(1, num_bins + 1):
        low, high = (number - 1) / num_bins, number / num_bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (c == 0 and number == 1)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            average = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - average)
    return total


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_calibration_error_equals_the_papers_formula(num_bins: int) -> None:
    """Random confidences and those on the edges of bins."""
    confidence = torch.cat([torch.rand(300), torch.arange(0, 5) / 4]).double()
    correct = torch.rand(305) < confidence
    expected = calibration_by_bins(confidence.tolist(), correct.tolist(), num_bins)
    error = metrics.expected_calibration_error(confidence, correct, num_bins=num_bins)
    assert error == pytest.approx(expected, abs=1e-12)


def test_calibration_error_by_hand() -> None:
    """Bin (0.5, 0.75]: accuracy 0.5, confidence 0.65; bin (0.75, 1]: accuracy 1, confidence 0.9; weights 1/2 each."""
    confidence, correct = torch.tensor([0.6, 0.7, 0.9, 0.9]), torch.tensor([True, False, True, True])
    assert metrics.expected_calibration_error(confidence, correct, num_bins=4) == pytest.approx(0.125, abs=1e-7)
    assert metrics.expected_calibration_error(torch.ones(9), torch.ones(9, dtype=torch.bool)) == 0
    assert metrics.expected_calibration_error(torch.ones(9), torch.zeros(9, dtype=torch.bool)) == 1


def test_metrics_over_nothing_are_refused() -> None:
    """NaN would travel into reports."""
    nothing = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="at least one image"):
        metrics.accuracy(nothing, nothing)
    with pytest.raises(ValueError, match="at least one image"):
        metrics.expected_calibration_error(torch.zeros(0), nothing.bool())


def test_logits_are_not_taken_for_confidences() -> None:
    """Values above 1 would all fall into the last bin."""
    with pytest.raises(ValueError, match="Pass probabilities, not logits"):
        metrics.expected_calibration_error(torch.tensor([0.5, 7.0]), torch.tensor([True, True]))


def test_evaluate_modules_give_the_same_numbers(labelled: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The library wraps inputs in Arrow tables; the values must survive."""
    predicted, labels = labelled
    both = {"predictions": predicted.tolist(), "references": labels.tolist()}
    confidence = torch.rand(500).double()
    assert Accuracy().compute(**both)["accuracy"] == metrics.accuracy(predicted, labels)
    per_class = PerClassAccuracy().compute(**both, num_classes=CLASSES)
    assert per_class["per_class_accuracy"][-1] is None
    assert per_class["mean_class_accuracy"] == pytest.approx(sum(per_class["per_class_accuracy"][:-1]) / (CLASSES - 1))
    harmonic = HarmonicMean().compute(base=[80.0, 70.0], new=[60.0, 50.0])["harmonic_mean"]
    assert harmonic == metrics.harmonic_mean(75.0, 55.0)
    error = ExpectedCalibrationError().compute(**both, confidences=confidence.tolist(), num_bins=10)
    expected = metrics.expected_calibration_error(confidence, predicted == labels, num_bins=10)
    assert error["expected_calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_evaluate_modules_add_up_batches() -> None:
    """`add_batch` is how the library is used in loops."""
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add(predictions=1, references=1)
    assert metric.compute()["accuracy"] == pytest.approx(200 / 3)


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise RuntimeError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate
from peft_vlm.evaluation.evaluate_metrics import metric_path
names = ["accuracy", "per_class_accuracy", "harmonic_mean", "expected_calibration_error"]
loaded = [evaluate.load(metric_path(name)) for name in names]
assert [metric.name for metric in loaded] == names
print(loaded[0].compute(predictions=[1, 0], references=[1, 1]))
"""


def test_evaluate_loads_the_files_in_a_process_without_network(tmp_path: Path) -> None:
    """`evaluate.load("accuracy")` asks the Hub even when a copy is installed; loading by path must not."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "{'accuracy': 50.0}" in done.stdout


def test_a_metric_that_does_not_exist_lists_those_that_do() -> None:
    """Instead of a search on the Hub."""
    with pytest.raises(ValueError, match=r"\('accuracy', 'expected_calibration_error', .*got 'f1'"):
        metric_path("f1")
    assert issubclass(Accuracy, evaluate.Metric)
