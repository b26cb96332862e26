"""Top-1 accuracy as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from peft_vlm.evaluation import metrics


class Accuracy(evaluate.Metric):
    """Share of right predictions in percent: `compute(predictions=..., references=...)["accuracy"]`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Share of images whose predicted class is right, in percent.",
            citation="",
            inputs_description="predictions and references: class ids.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy(torch.tensor(predictions), torch.tensor(references))}
