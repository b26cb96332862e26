"""Validation metrics per image, so that those of several processes are exact where the last batch is uneven."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

Metrics = Callable[[EvalPrediction], dict[str, float]]


def classes_and_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and cross-entropies instead of logits, so that memory does not grow with images times classes.

    Args:
        logits: A row per image.
        labels: Right class of each image.
    """
    return logits.argmax(dim=-1), nn.functional.cross_entropy(logits.float(), labels, reduction="none")


class WithLoss:
    """Metrics of class ids, and the mean cross-entropy as `loss`.

    The base class takes the mean of the batches' losses, which counts the images twice that fill up a last batch.

    Args:
        metrics: Metrics from predicted class ids and labels.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """All metrics."""
        assert len(prediction.predictions) == 2, "what `classes_and_losses` gave"
        classes, losses = prediction.predictions[0], prediction.predictions[-1]
        metrics = self.metrics(EvalPrediction(predictions=classes, label_ids=prediction.label_ids))
        return {"loss": float(torch.as_tensor(losses).double().mean()), **metrics}


def accuracy_metric(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy in percent."""
    return {"accuracy": 100.0 * float((prediction.predictions == prediction.label_ids).mean())}
