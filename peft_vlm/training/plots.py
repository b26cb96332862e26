"""The training curve as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_vlm.figures import new_figure


def training_curve_png(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot loss and, where logged, accuracy on training batches and validation images over the epochs.

    Args:
        history: `trainer.state.log_history`.
        path: PNG file to write.
    """
    figure = new_figure(9, 3.5)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for axes, series in (
        (loss_axes, (("loss", "training", 1.0), ("eval_loss", "validation", 1.0))),
        (accuracy_axes, (("accuracy", "training batches", 100.0), ("eval_accuracy", "validation", 1.0))),
    ):
        for key, label, scale in series:
            points = [(entry["epoch"], scale * entry[key]) for entry in history if key in entry and "epoch" in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    loss_axes.set_ylabel("loss")
    accuracy_axes.set_ylabel("accuracy (%)")
    figure.savefig(path)
