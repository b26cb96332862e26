"""Progress line, JSON log and curve of a pretraining run."""

import json
import sys
import time
from pathlib import Path


class RunLog:
    """Averages the figures of every 20 steps, prints a progress line with the time left, and saves the log.

    Args:
        steps: Steps of the whole run.
        batch_size: Pairs per step.
        loss_name: What the loss is, for the curve.
        accuracy_name: What the figure `accuracy` is, in percent.
    """

    every = 20

    def __init__(
        self,
        steps: int,
        batch_size: int,
        *,
        loss_name: str = "contrastive loss",
        accuracy_name: str = "in-batch top-1",
    ) -> None:
        self.steps, self.batch_size = steps, batch_size
        self.loss_name, self.accuracy_name = loss_name, accuracy_name
        self.entries: list[dict[str, float]] = []
        self._pending: list[dict[str, float]] = []
        self._started = self._last = time.monotonic()
        self._cpu = time.process_time()

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return (self.entries[-1]["seconds"] if self.entries else 0.0) + time.monotonic() - self._last

    def add(self, step: int, figures: dict[str, float], *, progress: float) -> None:
        """Record the figures of step number `step` (from 0), after which `progress` (0 to 1) of the run is over."""
        self._pending.append(figures)
        if len(self._pending) < self.every and progress < 1:
            return
        now, cpu, count = time.monotonic(), time.process_time(), len(self._pending)
        means = {key: sum(entry[key] for entry in self._pending) / count for key in figures}
        before = self.entries[-1] if self.entries else {"seconds": 0.0, "cpu_seconds": 0.0}
        entry = {
            "step": step + 1,
            "pairs": (step + 1) * self.batch_size,
            **{key: round(value, 4) for key, value in means.items()},
            "seconds": round(before["seconds"] + now - self._last, 1),
            "cpu_seconds": round(before["cpu_seconds"] + cpu - self._cpu, 1),
        }
        speed = count * self.batch_size / (now - self._last)
        left = max(0.0, 1 - progress) / progress * entry["seconds"] / 60
        print(
            f"step {step + 1}/{self.steps}  loss {means['loss']:.3f}  {self.accuracy_name} {means['accuracy']:.1f} %  "
            f"{speed:.0f} pairs/s  {left:.1f} min left",
            flush=True,
            file=sys.stderr,
        )
        self.entries.append(entry)
        self._pending, self._last, self._cpu = [], now, cpu

    def save(self, folder: Path) -> None:
        """Write `training_log.json` and `training_curve.png`."""
        folder.joinpath("training_log.json").write_text(json.dumps(self.entries, indent=0))
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        pairs = [entry["pairs"] / 1000 for entry in self.entries]
        for axis, key, label in ((left, "loss", self.loss_name), (right, "accuracy", f"{self.accuracy_name} (%)")):
            axis.plot(pairs, [entry[key] for entry in self.entries], linewidth=1)
            axis.set(xlabel="thousand image-text pairs", ylabel=label)
            axis.grid(alpha=0.3)
        figure.savefig(folder / "training_curve.png", dpi=90)
        plt.close(figure)
