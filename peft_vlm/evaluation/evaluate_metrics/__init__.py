"""The metrics as modules of the `evaluate` library, one file each, usable without any network.

Either make the object, `Accuracy().compute(predictions=[0], references=[0])`, or let the library load the file:
`evaluate.load(metric_path("accuracy"))`. Values equal those of `peft_vlm.evaluation.metrics`: accuracies in percent.
"""

from pathlib import Path

from peft_vlm.errors import check_choice
from peft_vlm.evaluation.evaluate_metrics.accuracy import Accuracy
from peft_vlm.evaluation.evaluate_metrics.expected_calibration_error import ExpectedCalibrationError
from peft_vlm.evaluation.evaluate_metrics.harmonic_mean import HarmonicMean
from peft_vlm.evaluation.evaluate_metrics.per_class_accuracy import PerClassAccuracy

__all__ = ["Accuracy", "ExpectedCalibrationError", "HarmonicMean", "PerClassAccuracy", "metric_path"]


def metric_path(name: str) -> str:
    """Path of a metric's file, for `evaluate.load`.

    Args:
        name: `"accuracy"`, `"per_class_accuracy"`, `"harmonic_mean"` or `"expected_calibration_error"`.

    Raises:
        ValueError: If there is no such metric.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    check_choice("name", name, names)
    return str(folder / f"{name}.py")
