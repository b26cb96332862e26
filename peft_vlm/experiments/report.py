"""Tables and plots of an experiment's `metrics.json`, and the peak memory that one of its parts needed."""

import ctypes
import gc
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_vlm.distributed import is_main_process
from peft_vlm.evaluation.plots import new_figure, save_figure
from peft_vlm.evaluation.report import paired_difference
from peft_vlm.serving.escape import markdown, printable

SCORES = {"base": "base %", "new": "new %", "h": "H %", "accuracy": "accuracy %"}
COSTS = {"seconds": "seconds", "peak_memory_mb": "peak MB"}


def _sections(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Results by task name, the first task included.

    Args:
        report: Result of `Experiment.run`.
    """
    return {report["task"]: report["methods"], **{name: task["methods"] for name, task in report["tasks"].items()}}


def markdown_table(report: Mapping[str, Any]) -> str:
    """One Markdown table per task: mean and standard deviation over the seeds, costs, and the paired gain over
    zero-shot, which is the first row that trains nothing.

    The gain is the mean over seeds of (method - zero-shot), with the standard deviation of those differences.

    Args:
        report: Result of `Experiment.run`.
    """
    parts = []
    for name, methods in _sections(report).items():
        scores = [key for key in SCORES if any(row.get(key) for row in methods.values())]
        headline = "base" if "base" in scores else scores[0]
        header = [
            "method",
            *(SCORES[key] for key in scores),
            f"gain in {headline}",
            "trainable parameters",
            *COSTS.values(),
        ]
        lines = [f"### {markdown(name)}, {_seeds(report)}", "", _row(header), _row(["---"] * len(header))]
        untrained = next((row for row in methods.values() if not row["trainable_parameters"]), {})
        for method, row in methods.items():
            cells = [
                markdown(method.replace("_", " ")) + (" (transductive)" if row.get("transductive") else ""),
                *(_mean_std(row.get(key)) for key in scores),
            ]
            cells += [_gain(row.get(headline), untrained.get(headline))]
            cells += [f"{row['trainable_parameters']:,}", *(_mean_std(row.get(key)) for key in COSTS)]
            lines.append(_row(cells))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def show_results(report: Mapping[str, Any], folder: Path, *, learner: str) -> None:
    """Write `table.md` and `results.png` beside `metrics.json`, and print the table; from the main process.

    Args:
        report: Result of `Experiment.run`.
        folder: Output folder.
        learner: Whose adapter, that of the last seed, the printed example uses.
    """
    if not is_main_process():
        return
    table = markdown_table(report)
    (folder / "table.md").write_text(table, encoding="utf-8")
    _results_png(report, folder / "results.png")
    adapter = folder / report["task"] / learner / f"seed{report['seeds'][-1]}"
    print(f"\n{table}")
    print(printable(f"Written to {folder}/: metrics.json, table.md, results.png, and each run's adapter."))
    print(f"Use an adapter:  peft-vlm predict {str(adapter)!r} photo.png")


def _results_png(report: Mapping[str, Any], path: Path) -> None:
    """Bars of the scores of every method, one panel per task, every seed as a dot.

    Args:
        report: Result of `Experiment.run`.
        path: PNG file to write.
    """
    tasks = _sections(report)
    figure = new_figure(6 * len(tasks), 4)
    for axes, (name, methods) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        scores = [key for key in SCORES if any(row.get(key) for row in methods.values())]
        width = 0.8 / len(scores)
        for offset, key in enumerate(scores):
            rows = [(x, row[key]) for x, row in enumerate(methods.values()) if row.get(key)]
            places = [x + (offset - (len(scores) - 1) / 2) * width for x, _ in rows]
            axes.bar(places, [statistics.mean(v) for _, v in rows], width, label=SCORES[key].removesuffix(" %"))
            for place, (_, values) in zip(places, rows, strict=True):
                axes.plot([place] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(methods)), [method.replace("_", "\n") for method in methods])
        axes.set_title(f"{name} ({_seeds(report)})")
        axes.set_ylabel("top-1 accuracy (%)")
        axes.grid(axis="y", alpha=0.3)
        if len(scores) > 1:
            axes.set_ylim(top=1.15 * axes.get_ylim()[1])
            axes.legend(loc="upper center", ncols=len(scores))
    save_figure(figure, path)


def _seeds(report: Mapping[str, Any]) -> str:
    return f"{len(report['seeds'])} seed{'s' if len(report['seeds']) > 1 else ''}"


def _row(cells: Sequence[str]) -> str:
    """A table row."""
    return "| " + " | ".join(cells) + " |"


def _mean_std(values: Sequence[float] | None) -> str:
    """Mean and sample standard deviation over seeds; a dash where a method has no answer."""
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _gain(values: Sequence[float] | None, baseline: Sequence[float] | None) -> str:
    """Mean paired difference to zero-shot with its standard deviation over the seeds."""
    if not values or not baseline or values is baseline:
        return "-"
    difference = paired_difference(values, baseline)
    spread = "" if difference.std is None else f" +- {difference.std:.1f}"
    return f"{difference.mean:+.1f}{spread}"


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the peak between `start` and `stop` in MB (2**20 bytes): on a GPU the allocator's, on Linux the
    process's.

    Freed memory is returned to the system first, so that what earlier work left in the allocator
    neither counts nor hides what this one needs.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline: float | None = None

    def start(self) -> None:
        """Begin: everything in use now is the baseline."""
        gc.collect()
        self.baseline = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.baseline = torch.cuda.memory_allocated(self.device) / 2**20
            return
        if sys.platform == "linux":
            try:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                _CLEAR_REFS.write_text("5")  # resets VmHWM to the current resident size
            except (OSError, AttributeError):  # another C library, or a container that does not let a process reset it
                return
            self.baseline = _status_mb("VmRSS")

    def stop(self) -> float | None:
        """End: megabytes above the baseline; None where the system offers no measure."""
        if self.baseline is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.baseline
        return max(0.0, _status_mb("VmHWM") - self.baseline)


def _status_mb(key: str) -> float:
    """A line of /proc/self/status in MB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024
