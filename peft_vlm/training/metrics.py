"""Losses, their terms and training accuracy over the steps that were made, over all processes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from peft_vlm.distributed import num_processes, sum_over_processes


class RunningMeans:
    """Sums since the last line of the log, in the epoch, and in all, on the device of the run until asked for.

    Steps that are left out count nowhere: their loss is not finite, and so would be every sum with it.
    """

    def __init__(self) -> None:
        self._step: list[dict[str, Tensor]] = []
        self._since_log, self._epoch, self._run = _Sums(), _Sums(), _Sums()

    def start_epoch(self) -> None:
        """Forget the losses of the epoch before."""
        self._epoch = _Sums()

    def epoch_loss(self) -> float | None:
        """Mean loss of the batches since `start_epoch`; None without any. All processes call it together."""
        return self._epoch.means().get("loss")

    def run_loss(self) -> float | None:
        """Mean loss of all batches; None without any. All processes call it together."""
        return self._run.means().get("loss")

    def add(self, outputs: dict[str, Tensor]) -> None:
        """Remember a batch until its step is made or left out.

        Args:
            outputs: Of `TrainingModule`.
        """
        self._step.append({key: value.detach().float() for key, value in outputs.items()})

    def end_step(self, *, left_out: bool) -> None:
        """Count the batches of a step, or forget them. All processes decide alike.

        Args:
            left_out: Whether the step was left out.
        """
        for outputs in self._step if not left_out else ():
            self._since_log.add(outputs)
            for sums in (self._epoch, self._run):
                sums.add({"loss": outputs["loss"]})
        self._step = []

    def take(self) -> dict[str, float]:
        """The mean loss and the mean of every term, `accuracy` where images had labels; and begin anew. All processes
        call it together.

        A term is the mean over batches, the accuracy that over images. Empty where no step was made.
        """
        sums, self._since_log = self._since_log, _Sums()
        means = sums.means()
        correct, labelled = means.pop("correct", 0.0), means.pop("labelled", 0.0)
        return means | ({"accuracy": correct / labelled} if labelled else {})


class _Sums:
    """Sums of named values over batches."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.batches = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.values[key] = self.values[key] + value if key in self.values else value
        self.batches += 1

    def means(self) -> dict[str, float]:
        """Sums of all processes over batches of all processes."""
        if not self.batches:
            return {}
        totals = sum_over_processes(torch.stack(list(self.values.values()))).tolist()
        return {key: total / (self.batches * num_processes()) for key, total in zip(self.values, totals, strict=True)}


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
