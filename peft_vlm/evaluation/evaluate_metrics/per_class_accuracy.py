"""Accuracy of each class as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from peft_vlm.evaluation import metrics


class PerClassAccuracy(evaluate.Metric):
    """Accuracy among the images of each class in percent, and the mean over the classes that have images.

    `compute(predictions=..., references=..., num_classes=...)` gives `per_class_accuracy`, a list with None for
    classes without images, and `mean_class_accuracy`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Accuracy among the images of each class, in percent.",
            citation="",
            inputs_description="predictions and references: class ids; num_classes: number of classes.",
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[int], references: list[int], num_classes: int
    ) -> dict[str, list[float | None] | float]:
        values = metrics.per_class_accuracy(
            torch.tensor(predictions), torch.tensor(references), num_classes=num_classes
        )
        present = [None if value != value else value for value in values.tolist()]
        return {"per_class_accuracy": present, "mean_class_accuracy": values.nanmean().item()}
