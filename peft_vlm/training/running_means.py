"""Loss terms and training accuracy between two lines of the log, over all processes."""

import torch
from torch import Tensor

from peft_vlm.processes import num_processes, sum_over_processes


class RunningMeans:
    """Sums that stay on the device of the run until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._epoch: list[Tensor] = []

    def start_epoch(self) -> None:
        """Forget the losses of the epoch before."""
        self._epoch = []

    def epoch_loss(self) -> float | None:
        """Mean loss of the batches since `start_epoch`, over all processes; None without any."""
        if not self._epoch:
            return None
        return float(sum_over_processes(torch.stack(self._epoch).mean())) / num_processes()

    def add(self, outputs: dict[str, Tensor]) -> None:
        """Count a batch.

        Args:
            outputs: Of `TrainingModule`.
        """
        for key, value in outputs.items():
            if key != "loss":
                value = value.detach().float()
                self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._batches += 1
        self._epoch.append(outputs["loss"].detach().float())

    def take(self) -> dict[str, float]:
        """The mean of every term, `accuracy` where images had labels; and begin anew. All processes call it together.

        A term is the mean over batches, the accuracy that over images.
        """
        if not self._batches:
            return {}
        sums = sum_over_processes(torch.stack(list(self._sums.values()))).tolist()
        totals, batches = dict(zip(self._sums, sums, strict=True)), self._batches * num_processes()
        self._sums, self._batches = {}, 0
        correct, labelled = totals.pop("correct"), totals.pop("labelled")
        means = {key: value / batches for key, value in totals.items()}
        return means | ({"accuracy": correct / labelled} if labelled else {})
