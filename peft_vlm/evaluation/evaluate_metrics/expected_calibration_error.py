"""Expected calibration error as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from peft_vlm.evaluation import metrics


class ExpectedCalibrationError(evaluate.Metric):
    """Distance of confidence and accuracy in [0, 1].

    `compute(predictions=..., references=..., confidences=..., num_bins=15)["expected_calibration_error"]`.
    """

    def _info(self) -> evaluate.MetricInfo:
        ids = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Mean distance of confidence and accuracy over equal bins of confidence, in [0, 1].",
            citation="On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.",
            inputs_description="predictions and references: class ids; confidences: probability of the prediction.",
            features=datasets.Features({**ids, "confidences": datasets.Value("float64")}),
        )

    def _compute(
        self, predictions: list[int], references: list[int], confidences: list[float], num_bins: int = 15
    ) -> dict[str, float]:
        correct = torch.tensor(predictions) == torch.tensor(references)
        confidence = torch.tensor(confidences, dtype=torch.float64)
        error = metrics.expected_calibration_error(confidence, correct, num_bins=num_bins)
        return {"expected_calibration_error": error}
