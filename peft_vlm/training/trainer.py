"""`VLMTrainer`: Hugging Face's Trainer around one module of model and objective."""

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from peft_vlm.data.dataset import RunImages
from peft_vlm.data.feature_store import keep_decoded
from peft_vlm.distributed import from_main, is_main_process
from peft_vlm.errors import PeftVLMError
from peft_vlm.files import SUMMARY_NAME, installed_version, last_part, locked_folder
from peft_vlm.hub.publish import Published, saved_adapter
from peft_vlm.training.callbacks import FiniteSteps, Interrupt, ObjectiveCallback, RunReport, with_advice
from peft_vlm.training.checkpoints import (
    PARTIAL_NAME,
    PREFIX,
    STATE_NAME,
    EarlierRun,
    atomic_folder,
    check_whole,
    checkpoint_to_resume,
    load_objective_state,
    load_weights,
    moved_into,
    save_objective_state,
    save_weights,
    step_of,
)
from peft_vlm.training.deepspeed import start_deepspeed
from peft_vlm.training.inputs import (
    check_arguments,
    check_evaluation,
    check_prediction,
    check_training,
    default_objective,
    evaluation_loader,
    run_images,
    train_loader,
)
from peft_vlm.training.metrics import EvaluationMetrics, LossSums
from peft_vlm.training.module import TrainingModule
from peft_vlm.training.reports import (
    ArtifactsCallback,
    describe_adapter,
    publish_run,
    push_checkpoint,
    write_card,
)
from peft_vlm.training.resume import RunRecord, name_of_optimizer, settings_of, without_optimizer
from peft_vlm.training.schedule import build_optimizer, epoch_cosine_scheduler

#: Names of `transformers.Trainer` that begin with an underscore and are overridden or set here, each with what for.
PRIVATE_NAMES = {
    "_get_dataloader": "the objective composes the batches, and each dataset has its own collator",
    "_save_checkpoint": "a checkpoint is written atomically and has a manifest",
    "_load_from_checkpoint": "a checkpoint holds the active adapter under any name, and the objective's state",
    "_load_best_model": "the best checkpoint too",
    "_created_lr_scheduler": "a second `train()` gets a new schedule",
}


class VLMTrainer(Trainer):
    """Trains an adapter (or, for baselines, a whole model) by an objective.

    Checkpoints hold the adapter only, plus what an exact resume needs. At the end `output_dir` holds the adapter,
    `metrics.json`, `training_summary.json` and, when matplotlib is installed, `training_curve.png`.

    Arguments come in the order of `transformers.Trainer`; those that nothing would read are refused by name.

    Args:
        model: `PeftModel` with the adapter to train active, or a plain model.
        args: Settings of the run.
        data_collator: Refused: a dataset makes its batches itself.
        train_dataset: Training images: a dataset, a stream, or a `datasets.Dataset` with an image and a label column.
            They stay as they are: a run works on a view of its own.
        eval_dataset: Validation images with the same classes, or several by name; never the test split, since the best
            checkpoint may be chosen on it.
        processing_class: Processor of the model, for images without a transform and for class prompts; None: that
            beside the model's weights.
        model_init: Refused: the objective belongs to one model.
        compute_loss_func: Refused: the objective is the loss.
        compute_metrics: Metrics from logits and labels; accuracy in percent by default.
        callbacks: Further callbacks.
        optimizers: Optimizer and schedule in place of those of the arguments.
        optimizer_cls_and_kwargs: Class and settings of the optimizer in place of those of the arguments.
        preprocess_logits_for_metrics: Makes what is gathered for `compute_metrics` and `predict` out of logits.
        objective: What is minimised; None: that of the method whose adapter the model has, if it needs no teacher.
        template: Text around a class name, for the prompts of that objective.

    Raises:
        ValueError: If an argument is given that nothing would read.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        *,
        objective: Any = None,
        template: str | Sequence[str] | None = None,
    ) -> None:
        refused = {"data_collator": data_collator, "model_init": model_init, "compute_loss_func": compute_loss_func}
        check_arguments(model, args, objective, refused)
        self.image_model, self.processor = model, processing_class
        train_dataset = run_images(train_dataset, model, processing_class, name="train_dataset")
        if objective is None:
            objective = default_objective(model, train_dataset, template=template, processor=processing_class)
        elif template is not None:
            raise ValueError("Expected no `template` beside an `objective`, whose prompts have one. Leave it out.")
        check_training(model, objective, train_dataset)
        self.objective = objective
        if compute_metrics is None:
            args = copy.copy(args)
            args.batch_eval_metrics = True  # memory does not grow with images times classes; `predict` still gathers
        self.record = RunRecord(self, optimizer=name_of_optimizer(args, optimizers[0], optimizer_cls_and_kwargs))
        if optimizers[0] is None:
            optimizer_cls_and_kwargs = (lambda: build_optimizer, {"args": args, "given": optimizer_cls_and_kwargs})
        self.losses, self.interrupt = LossSums(), Interrupt()
        self.metrics = EvaluationMetrics(
            compute_metrics,
            by_batch=args.batch_eval_metrics and compute_metrics is not None,
            has_logits=preprocess_logits_for_metrics is None,
        )
        self.images: RunImages | None = None
        self.first_step, self.steps_per_epoch = 0, 1
        super().__init__(
            model=TrainingModule(model, objective).sharded(args),  # or the base class puts all of it on the device
            args=args,
            data_collator=train_dataset.collate,
            train_dataset=train_dataset,
            eval_dataset=self._evaluation_images(eval_dataset),
            compute_metrics=self.metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model.register_forward_hook(self.losses.record, with_kwargs=True)
        self.callback_handler.callbacks[:0] = [RunReport(self), ObjectiveCallback(self)]
        last = (EarlierRun(self), self.interrupt, ArtifactsCallback(self))
        for callback in (FiniteSteps(self, args.non_finite), *objective.callbacks(model), *last):
            self.add_callback(callback)

    def _evaluation_images(self, images: Any) -> Any:
        """Images for an evaluation, checked; several by name stay several."""
        if images is None or (isinstance(images, Mapping) and not isinstance(images, datasets.DatasetDict)):
            return images and {name: self._evaluation_images(part) for name, part in images.items()}
        found = run_images(images, self.image_model, self.processor, name="eval_dataset")
        check_evaluation(self.objective, found)
        return found

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A folder; True for the newest whole checkpoint in `output_dir`; `"auto"` for the
                same, or for the beginning where there is none. A damaged checkpoint is named in a warning and the one
                before it is used. None takes the setting of the arguments.
            trial: Of `transformers.Trainer.train`.
            ignore_keys_for_eval: Of `transformers.Trainer.train`.
        """
        choice = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        folder = Path(self.args.output_dir)
        with with_advice(self.args, self.objective.config_dict()):
            self.record.check_agreement(choice)
            with locked_folder(folder, is_main=is_main_process(), tell=from_main):
                return self._train(choice, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | bool | None, *options: Any) -> TrainOutput:
        """Train in the run's folder, which nobody else writes to."""
        checkpoint, self.first_step = None, 0
        if self.is_deepspeed_enabled:
            start_deepspeed(self)
        self.record.start()
        if is_main_process():  # of a run that was killed
            shutil.rmtree(Path(self.args.output_dir) / PARTIAL_NAME, ignore_errors=True)
        if resume_from_checkpoint:
            checkpoint = checkpoint_to_resume(resume_from_checkpoint, Path(self.args.output_dir))
        if checkpoint is not None:
            self.first_step = step_of(checkpoint)
            self.record.compare(checkpoint)
            if self.is_deepspeed_enabled:  # the base class then leaves out `_load_from_checkpoint`
                load_objective_state(self.objective, checkpoint)
        self.images = self._view()
        with self.interrupt.watched():
            if checkpoint is None:
                output = super().train(None, *options)
            else:
                with without_optimizer(checkpoint, leave_out=self.record.has_new_optimizer) as folder:
                    output = super().train(str(folder), *options)
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def _view(self) -> RunImages:
        images = self.train_dataset.for_run(skip_unreadable=self.args.unreadable_images == "skip")
        reads_once = not self.objective.needs_pixels and images.has_fixed_pixels
        return keep_decoded(images, self.args.decoded_images, reads_once=reads_once)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[Any, ...]:
        """The base class's values, of which the schedule needs the updates per epoch.

        A run that had ended and is started again has no epoch left, also where it had ended in mid-epoch, where the
        base class would make a step more.
        """
        num_epochs, self.steps_per_epoch, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self.first_step >= max_steps:
            num_epochs = self.first_step // self.steps_per_epoch
        return (num_epochs, self.steps_per_epoch, *others, max_steps)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        """Batches as the objective composes them; for an evaluation all images in order, with their own collator."""
        if is_training:
            images = self._view() if self.images is None else self.images
            return train_loader(images, self.objective, self.args, batch_size=batch_size)
        if description == "test":  # `predict`, also of images without labels
            dataset = run_images(dataset, self.image_model, self.processor, name="test_dataset")
            check_prediction(self.objective, dataset)
        else:
            dataset = self._evaluation_images(dataset)
        self.metrics.start()
        return self.accelerator.prepare(evaluation_loader(dataset, self.args))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The per-epoch cosine, or transformers' scheduler where `lr_schedule` says so."""
        own: Any = self.optimizer if optimizer is None else optimizer
        if self.args.lr_schedule == "transformers":
            super().create_scheduler(num_training_steps, own)
        elif self.lr_scheduler is None:
            num_epochs = math.ceil(num_training_steps / self.steps_per_epoch)
            if self.args.warmup_epochs >= num_epochs and not self.control.should_training_stop:
                raise PeftVLMError(
                    f"Expected a run longer than its warm-up, got {num_epochs} epoch{'s' * (num_epochs > 1)} and "
                    f"`warmup_epochs`={self.args.warmup_epochs}: every step would be made at the warm-up rate "
                    f"{self.args.warmup_learning_rate:g}. Train longer, or set `warmup_epochs` to 0."
                )
            self.lr_scheduler = epoch_cosine_scheduler(
                own,
                steps_per_epoch=self.steps_per_epoch,
                num_epochs=num_epochs,
                warmup_epochs=self.args.warmup_epochs,
                warmup_rate=self.args.warmup_learning_rate,
            )
            self._created_lr_scheduler = True
        self.record.note_rates(own)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the mean loss, loss terms and training accuracy of all processes since the last log, or of the run.

        Args:
            logs: Quantities; those of a run's end get the mean loss of the steps made since `train` was called.
            start_time: Of the base class.
        """
        if "loss" in logs:
            logs.pop("loss")  # the base class's stays NaN for good after one step that was skipped
            logs |= self.losses.take()
        if "train_loss" in logs:
            mean = self.losses.run_loss()
            logs.pop("train_loss")
            logs |= {} if mean is None else {"train_loss": mean}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter with everything needed to use it, from the main process, file by file in one step each.

        Args:
            output_dir: Target; the run's folder by default.
            _internal_call: Of the base class: False also pushes, where the arguments say so.
        """
        self.save_adapter(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def save_adapter(self, folder: Path, *, reports: Callable[[Path], None] | None = None) -> None:
        """Write the adapter and what lies beside it, moved into place when all of it is on disk.

        Args:
            folder: Target.
            reports: Writes further files into the folder that it gets.
        """
        facts = describe_adapter(self.model.model, self.objective, self.train_dataset)
        state = self.objective.state_dict()  # all processes take part
        if not self.args.should_save:
            return
        with moved_into(folder, last=SUMMARY_NAME) as partial:
            save_weights(self.model, partial, facts)
            save_objective_state(state, partial)
            if reports is not None:
                reports(partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the base class write a checkpoint aside, and rename it when all of it is on disk."""
        run, step = Path(self.args.output_dir), self.state.global_step
        folder, best = run / f"{PREFIX}{step}", run / f"{PREFIX}{self.state.best_global_step}"
        facts = {
            "peft_vlm": installed_version(),
            "step": step,
            "last_step": self.state.max_steps,
            **self.record.facts(),
        }
        facts |= {"settings_found": settings_of(self.model.model, self.objective), "changes": self.record.changes}
        with atomic_folder(folder, facts=facts) as partial:
            with self._arguments(output_dir=str(partial.parent), push_to_hub=False, save_total_limit=None):
                self._note_callbacks()
                super()._save_checkpoint(model, trial)
            if self.state.best_global_step and (best == folder or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self._note_callbacks()
                self.state.save_to_json(str(partial / STATE_NAME))
        if self.args.push_to_hub and self.is_world_process_zero():
            self._wait_for_push()
            self.push_in_progress = push_checkpoint(self.args, self.hub_model_id, folder, step=step)
        if self.args.should_save:
            limit, best_checkpoint = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run), limit, best_checkpoint, use_mtime=True)

    @contextmanager
    def _arguments(self, **changes: Any) -> Iterator[None]:
        """Other settings for a while."""
        before, self.args = self.args, copy.copy(self.args)
        vars(self.args).update(changes)
        try:
            yield
        finally:
            self.args = before

    def _note_callbacks(self) -> None:
        """Put the state of callbacks that have one into the trainer state; the base class appends to earlier ones."""
        exported: dict[str, list[Any]] = {}
        assert self.state.stateful_callbacks is not None, "the trainer fills it when training begins"
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        for name, states in exported.items():
            several = isinstance(self.state.stateful_callbacks.get(name), list)
            self.state.stateful_callbacks[name] = states if several else states[-1]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore adapter and objective, whatever the adapter's name."""
        load_weights(self.model, Path(resume_from_checkpoint))
        load_objective_state(self.objective, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best checkpoint's adapter under its own name; the base class would always load `default`."""
        best = Path(self.state.best_model_checkpoint)
        moved = Path(self.args.output_dir) / last_part(best)  # the run may go on in another place
        best = moved if moved.is_dir() else best
        check_whole(
            best,
            advice="It is the best of the run, which has ended: go on from the last one with "
            "`load_best_model_at_end=False`, or remove the damaged one.",
        )
        load_weights(self.model, best)

    def push_to_hub(self, commit_message: str | None = None, **options: Any) -> Published | None:
        """Save and publish the adapter with its reports and a card; see `peft_vlm.publish`.

        Evaluate first: `peft-vlm evaluate --baseline --adapter FOLDER --output_dir FOLDER ...` with the run's folder.
        Plain models are uploaded by the base class.

        Args:
            commit_message: Summary of the commit.
            **options: Passed to `publish`; licence, token, branch and visibility default to those of the arguments.

        Returns:
            Where it is; None on all but the main process, and for plain models.
        """
        folder = saved_adapter(self.model.model, self.args.output_dir)
        if folder is None:
            super().push_to_hub(commit_message or "End of training", **options)
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=options.get("token"), private=options.get("private"))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._wait_for_push()
        return publish_run(folder, self.args, self.hub_model_id, commit_message=commit_message, **options)

    def _wait_for_push(self) -> None:
        """Wait for a checkpoint that is being uploaded."""
        push = getattr(self, "push_in_progress", None)
        if push is not None:
            push.wait_until_done()

    def create_model_card(self, license: str | None = None, **options: Any) -> None:
        """Write the card of the run's folder; that of the base class for plain models.

        Args:
            license: Identifier of the licence; None for the one of the arguments.
            **options: Of the base class.
        """
        folder = saved_adapter(self.model.model, self.args.output_dir)
        if folder is None:
            super().create_model_card(license=license, **options)
        elif self.is_world_process_zero():
            write_card(folder, license=license or self.args.hub_license)
