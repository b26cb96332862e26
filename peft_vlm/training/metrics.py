"""Sums over the batches of a run, in training and in evaluation; the only place where losses are added up."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from peft_vlm.distributed import num_processes, sum_over_processes


class LossSums:
    """Losses, their terms and training accuracy since the last line of the log, in the epoch, and in the whole run.

    They stay on the device of the run until asked for. A batch counts when its step is made: the loss of a step that
    is skipped is not finite, and so would be every sum with it.
    """

    def __init__(self) -> None:
        #: Loss and terms of each batch of the step that is being made, with the positions of its images.
        self.batches: list[tuple[dict[str, Tensor], Tensor]] = []
        self._since_log, self._epoch, self._run = _Sums(), _Sums(), _Sums()

    def record(self, module: nn.Module, args: Any, batch: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Remember a training batch until its step is made or skipped; a forward hook of `TrainingModule`.

        Args:
            module: The module; batches of an evaluation are not remembered.
            args: Of the hook; there are none.
            batch: Columns of `Batch`.
            outputs: What the module returned.
        """
        if module.training:
            values = {key: value.detach().float() for key, value in outputs.items()}
            self.batches.append((values, batch["index"]))

    def start_run(self) -> None:
        """Forget everything, also batches of a run that ended within a step."""
        self.batches = []
        self._since_log, self._epoch, self._run = _Sums(), _Sums(), _Sums()

    def start_epoch(self) -> None:
        """Forget the losses of the epoch before."""
        self._epoch = _Sums()

    def end_step(self, *, skipped: bool) -> None:
        """Count the batches of a step, or forget them. All processes decide alike.

        Args:
            skipped: Whether the step was skipped.
        """
        for outputs, _ in self.batches if not skipped else ():
            self._since_log.add(outputs)
            for sums in (self._epoch, self._run):
                sums.add({"loss": outputs["loss"]})
        self.batches = []

    def epoch_loss(self) -> float | None:
        """Mean loss of the batches since `start_epoch`; None without any. All processes call it together."""
        return self._epoch.means().get("loss")

    def run_loss(self) -> float | None:
        """Mean loss of all batches; None without any. All processes call it together."""
        return self._run.means().get("loss")

    def take(self) -> dict[str, float]:
        """Mean loss and terms since the last call, and `accuracy` in percent where images had labels.

        A term is the mean over batches, the accuracy that over images. Empty where no step was made. All processes
        call it together.
        """
        sums, self._since_log = self._since_log, _Sums()
        means = sums.means()
        correct, labelled = means.pop("correct", 0.0), means.pop("labelled", 0.0)
        return means | ({"accuracy": 100.0 * correct / labelled} if labelled else {})


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


Metrics = Callable[..., dict[str, float]]


class EvaluationMetrics:
    """Metrics of an evaluation, with the mean cross-entropy as `loss`.

    The base class takes the mean of the batches' losses, which weighs the images of a smaller last batch differently.

    Args:
        metrics: The user's metrics from logits and labels, as `transformers.Trainer` takes them; None: accuracy in
            percent, gathered batch by batch so that memory does not grow with images times classes.
        by_batch: Whether the metrics are asked after each batch (`batch_eval_metrics`).
        has_logits: Whether predictions are logits; a user's `preprocess_logits_for_metrics` may make them anything.
    """

    def __init__(self, metrics: Metrics | None, *, by_batch: bool, has_logits: bool = True) -> None:
        self.metrics, self.by_batch, self.has_logits = metrics, by_batch, has_logits
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []

    def start(self) -> None:
        """Forget an evaluation that was broken off."""
        self._losses, self._hits = [], []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """All metrics, after the last batch.

        Args:
            prediction: Logits and labels of all images, or of one batch.
            compute_result: False: further batches follow.
        """
        labels = torch.as_tensor(prediction.label_ids)
        if self.has_logits:
            self._add(torch.as_tensor(prediction.predictions), labels)
        given: dict[str, Any] = {"compute_result": compute_result} if self.by_batch else {}
        own = self.metrics(prediction, **given) if self.metrics is not None else {}
        if not compute_result:
            return own
        found = self._result()
        self.start()
        return found | own

    def _add(self, logits: Tensor, labels: Tensor) -> None:
        known = labels >= 0  # images without a label may be predicted
        losses = nn.functional.cross_entropy(logits[known].float(), labels[known], reduction="none")
        self._losses.append(losses.cpu())
        self._hits.append((logits[known].argmax(dim=-1) == labels[known]).cpu())

    def _result(self) -> dict[str, float]:
        if not self.has_logits or not sum(map(len, self._losses)):
            return {}
        found = {"loss": float(torch.cat(self._losses).double().mean())}
        if self.metrics is None:
            found["accuracy"] = 100.0 * float(np.mean(torch.cat(self._hits).numpy()))
        return found


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled images of a batch; NaN where none has a label.

    Args:
        logits: A row per image.
        labels: Right class of each image, negative where it is unknown.
    """
    known = labels >= 0
    if not bool(known.any()):
        return torch.tensor(math.nan, device=logits.device)
    return nn.functional.cross_entropy(logits[known].float(), labels[known])
