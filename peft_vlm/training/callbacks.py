"""Trainer callbacks: the objective's epoch hooks, and the files that a finished run leaves behind."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import from_all
from peft_vlm.training.module import TrainingModule


class ObjectiveCallback(TrainerCallback):
    """Calls `prepare` once and `epoch_start` before each epoch, and tells the dataset its epoch.

    Args:
        module: Model and objective.
        dataset: Training dataset.
        autocast: Context manager factory of the run's mixed precision, so that caches hold what training would
            compute.
        log: Logs a mapping of metrics.
    """

    def __init__(self, module: TrainingModule, dataset: Any, autocast: Any, log: Any) -> None:
        self.module, self.dataset, self.autocast, self.log = module, dataset, autocast, log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the objective on the device of the run, and log an epoch that was over but not logged at a resume.

        The checkpoint of the last step of an epoch is written before the epoch ends.
        """
        self.dataset.repeat_views(None)  # an earlier run may have left its views
        with self.autocast():
            self.module.objective.prepare(self.module.model, self.dataset)
        epoch = state.epoch or 0.0
        if round(epoch) > 0 and abs(epoch - round(epoch)) < 1e-6:
            metrics = self.module.objective.epoch_end()
            logged = [entry.keys() for entry in state.log_history if entry.get("epoch") == epoch]
            if metrics and not any(metrics.keys() <= keys for keys in logged):
                self.log(metrics)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the caches of the epoch that begins or, after a resume, goes on; none where no step is left."""
        if state.global_step >= state.max_steps:
            return
        epoch = int((state.epoch or 0.0) + 1e-6)
        self.dataset.set_epoch(epoch)
        with self.autocast():
            self.module.objective.epoch_start(self.module.model, self.dataset, epoch)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the objective has counted in the epoch."""
        metrics = self.module.objective.epoch_end()
        unreadable = set().union(*from_all(set(self.dataset.unreadable.rows)))
        if unreadable:
            metrics["unreadable_images"] = float(len(unreadable))
        if metrics:
            self.log(metrics)
