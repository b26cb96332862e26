"""Cells of a grid: trainings in folders of their own, of which those that are finished are not run again."""

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from peft_vlm.distributed import is_main_process
from peft_vlm.errors import AdapterError, DataError, PeftVLMWarning, shown
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.experiments.report import PeakMemory
from peft_vlm.experiments.run import run_training
from peft_vlm.files import BASELINE_NAME, REPORT_NAME, SUMMARY_NAME, is_of, read_json, write_json
from peft_vlm.settings import RunSettings
from peft_vlm.training.arguments import VLMTrainingArguments

CELL_NAME = "cell.json"


def finished_cell(folder: Path, wanted: Mapping[str, Any], *, columns: Sequence[str] = ()) -> dict[str, Any] | None:
    """Read the result of a finished cell; None where it is missing, or its file is damaged, which is said.

    Args:
        folder: Folder of the cell.
        wanted: Settings that it must have been run with, as JSON values. One that the cell of an earlier version does
            not have must be the default of `RunSettings`.
        columns: Scores that it must have, in percent.

    Raises:
        DataError: If it was run with other settings.
    """
    path = folder / CELL_NAME
    if not path.is_file():
        return None
    try:
        cell = read_json(path)
    except AdapterError:
        cell = None
    if cell is None or not _is_whole(cell, columns):
        warnings.warn(f"{str(path)!r} is damaged: the cell is run again.", PeftVLMWarning, stacklevel=2)
        return None
    defaults = asdict(RunSettings(method="", model="", dataset=""))
    before = {name: value for name, value in defaults.items() if name in wanted} | cell["settings"]
    other = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
    if other:
        changes = ", ".join(
            f"{name} {shown(before.get(name))} before, {shown(wanted.get(name))} now" for name in other
        )
        raise DataError(
            f"{str(folder)!r} holds the run of other settings: {changes}. Pass another `output_dir`, or the settings "
            "of before."
        )
    return cell


def _is_whole(cell: Any, columns: Sequence[str]) -> bool:
    """Whether what a file holds is the result of a cell with some scores."""
    if not isinstance(cell, dict) or not isinstance(cell.get("settings"), dict):
        return False
    scores = cell.get("scores")
    return is_of(scores, dict[str, float]) and all(0 <= scores.get(name, -1) <= 100 for name in columns)


def run_cell(
    settings: RunSettings,
    arguments: Callable[[dict[str, Any]], VLMTrainingArguments],
    folder: Path,
    *,
    wanted: Mapping[str, Any],
    measure: Callable[[], dict[str, float]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any] | None:
    """Train, measure, and write `cell.json` last, so that it is there only where all else is.

    Args:
        settings: Settings of the run.
        arguments: As for `run_training`; its `output_dir` is the folder.
        folder: Folder of the cell.
        wanted: What `finished_cell` will compare.
        measure: Measures the saved adapter; None: the test of the run itself.
        callbacks: Callbacks of the trainer.

    Returns:
        `settings`, `scores` in percent, `zero_shot` scores of the base model where they were measured, and the costs;
        None on all but the main process.
    """
    gc.collect()
    peak = PeakMemory(arguments({}).device)
    peak.start()
    run_training(settings, arguments, callbacks=callbacks)
    memory = peak.stop()
    if not is_main_process():
        return None
    scores = EvalReport.load(folder / REPORT_NAME).scores if measure is None else measure()
    summary, baseline = read_json(folder / SUMMARY_NAME), folder / BASELINE_NAME
    cell = {
        "settings": dict(wanted),
        "scores": scores,
        "zero_shot": EvalReport.load(baseline).scores if baseline.is_file() else None,
        "seconds": summary["metrics"]["train_runtime"],
        "peak_memory_mb": memory,
        "trainable_parameters": summary["trainable_parameters"],
    }
    write_json(folder / CELL_NAME, cell)
    return cell
