"""Checkpoints of an earlier run in the same folder: kept, but never taken for those of the run that goes on there."""

import shutil
import warnings
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import is_main_process, wait_for_everyone
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.training.checkpoint_folder import numbered_checkpoints

EARLIER = "earlier-"
"""In front of the name of a checkpoint that is set aside; transformers' rotation does not see such folders."""


class EarlierRun(TrainerCallback):
    """Renames checkpoints ahead of a run when it has made its first step, not before: a run that is refused or fails
    at its start changes nothing.

    A run that begins anew has all of them ahead; one that goes on from an early checkpoint has the later ones.
    """

    def __init__(self) -> None:
        self._start = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remember where the run begins."""
        self._start = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After the first step, set aside what lies ahead."""
        if state.global_step != self._start + 1:
            return
        if is_main_process():
            set_aside(Path(args.output_dir), behind=self._start)
        wait_for_everyone()


def set_aside(output_dir: Path, *, behind: int) -> None:
    """Rename checkpoints; a warning says so. Those of a run before the earlier one are replaced.

    Args:
        output_dir: Folder of the run.
        behind: Step behind which they lie.
    """
    found = [folder for step, folder in sorted(numbered_checkpoints(output_dir).items()) if step > behind]
    if not found:
        return
    names = ", ".join(folder.name for folder in found)
    try:
        for folder in found:
            aside = folder.with_name(EARLIER + folder.name)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    except OSError as error:
        message = f"Checkpoints of an earlier run could not be set aside and may be taken for this one's: {error}."
    else:
        message = (
            f"Checkpoints of an earlier run in {str(output_dir)!r} are kept as '{EARLIER}...': {names}. To go on with "
            "that run, give one of them as `resume_from_checkpoint`."
        )
    warnings.warn(message, PeftVLMWarning, stacklevel=2)
