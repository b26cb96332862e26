"""`VLMTrainer`: Hugging Face's Trainer around one module of model and objective.

Overrides of its internals live here.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.streaming import ImageStream
from peft_vlm.distributed import num_processes
from peft_vlm.errors import PeftVLMError
from peft_vlm.objective import Objective
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.callbacks import FiniteSteps, ObjectiveCallback, RunReport
from peft_vlm.training.checkpoints import EarlierRun, ResumableTrainer
from peft_vlm.training.checks import check_run
from peft_vlm.training.loaders import ShuffledBatches, stream_loader, train_loader
from peft_vlm.training.metrics import RunningMeans, WithLoss, accuracy_metric, classes_and_losses
from peft_vlm.training.module import TrainingModule
from peft_vlm.training.reports import ArtifactsCallback, PublishingTrainer, describe_adapter
from peft_vlm.training.schedule import epoch_cosine_scheduler


class VLMTrainer(PublishingTrainer, ResumableTrainer):
    """Trains an adapter (or, for baselines, a whole model) by an objective.

    Checkpoints hold the adapter only, plus what an exact resume needs. At the end `output_dir` holds the adapter,
    `metrics.json`, `training_summary.json` and, when matplotlib is installed, `training_curve.png`.

    Args:
        model: `PeftModel` with the adapter to train active, or a plain model.
        objective: What is minimised.
        args: Settings of the run.
        train_dataset: Training images, a dataset or a stream.
        eval_dataset: Validation images with the same classes; never the test split, since the best checkpoint may be
            chosen on it.
        compute_metrics: Metrics from predicted class ids and labels; accuracy in percent by default.
        callbacks: Further callbacks.
        **kwargs: Passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        args: VLMTrainingArguments,
        *,
        train_dataset: ImageClassificationDataset | ImageStream,
        eval_dataset: ImageClassificationDataset | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_run(model, objective, train_dataset, eval_dataset)
        if args.n_gpu > 1:  # several visible GPUs without a launcher would mean torch.nn.DataParallel
            args._n_gpu = 1
        self.objective = objective
        self.steps_per_epoch = 0
        self.running_means, self._finite = RunningMeans(), FiniteSteps(self, args.non_finite)
        train_dataset.unreadable.skip(args.unreadable_images == "skip")
        super().__init__(
            model=TrainingModule(model, objective),
            args=args,
            data_collator=train_dataset.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=WithLoss(compute_metrics or accuracy_metric),
            preprocess_logits_for_metrics=classes_and_losses,
            callbacks=callbacks,
            **kwargs,
        )
        first = ObjectiveCallback(self.model, train_dataset, self.accelerator.autocast, self.log)
        self.callback_handler.callbacks[:0] = [RunReport(self), first]
        own = (self._finite, *objective.callbacks(model), EarlierRun(), self.interrupt, ArtifactsCallback(self))
        for callback in own:
            self.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        """Batches as the objective composes them, else shuffled; without pixels when the objective caches features."""
        if isinstance(self.train_dataset, ImageStream):
            return stream_loader(self.train_dataset, self.args, batch_size=self._train_batch_size)
        dataset = self.train_dataset if self.objective.needs_pixels else self.train_dataset.without_pixels()
        size, args = self._train_batch_size * num_processes(), self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        batches = self.objective.batch_sampler(self.train_dataset.labels, batch_size=size, seed=args.seed)
        if batches is None:
            batches = ShuffledBatches(len(dataset), batch_size=size, seed=seed, drop_last=args.dataloader_drop_last)
        workers = args.dataloader_num_workers if self.objective.needs_pixels else 0
        return train_loader(dataset, batches, args, num_workers=workers)

    def _run_epoch(self, **kwargs: Any) -> None:
        """One epoch; a resumed stream is told what will be thrown away, so that it does not decode it.

        A run that ended in mid-epoch and is started again has nothing left to do; the base class would make a step.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if isinstance(self.train_dataset, ImageStream):
            resumed = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
            self.train_dataset.skip_batches(kwargs["steps_trained_in_current_epoch"] if resumed else 0)
        super()._run_epoch(**kwargs)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """The base class's loader with the dataset's own collator; training and validation may differ in theirs."""
        self.data_collator = dataset.collate
        return super()._get_dataloader(dataset, *args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> tuple[Any, ...]:
        """The base class's values; the schedule needs the updates per epoch."""
        values = super().set_initial_training_values(args, dataloader)
        self.steps_per_epoch = values[1]
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The objective's own optimizer, or that of the arguments.

        The latter has one parameter group per learning rate, and weight decay on every trained tensor as in the
        official codes.
        """
        if self.optimizer is None:
            self.optimizer = self.objective.optimizer(self.model.model, learning_rate=self.args.learning_rate)
        if self.optimizer is not None:
            return self.optimizer
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = []
        for name, parameters in self.objective.param_groups(named).items():
            rate = self.args.vision_learning_rate if name == "vision" else None
            groups.append({"params": parameters, "lr": self.args.learning_rate if rate is None else rate})
        if str(self.args.optim) in ("sgd", "OptimizerNames.SGD"):
            optimizer_class, options = torch.optim.SGD, {"momentum": self.args.momentum}
        else:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
        self.optimizer = optimizer_class(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The per-epoch cosine, or transformers' scheduler where `lr_schedule` says so."""
        if self.args.lr_schedule == "transformers":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            steps = self.steps_per_epoch or num_training_steps
            num_epochs = math.ceil(num_training_steps / steps)
            if self.args.warmup_epochs >= num_epochs and not self.control.should_training_stop:
                raise PeftVLMError(
                    f"Expected a run longer than its warm-up, got {num_epochs} epoch{'s' * (num_epochs > 1)} and "
                    f"`warmup_epochs`={self.args.warmup_epochs}: every step would be made at the warm-up rate "
                    f"{self.args.warmup_learning_rate:g}. Train longer, or set `warmup_epochs` to 0."
                )
            self.lr_scheduler = epoch_cosine_scheduler(
                optimizer or self.optimizer,
                steps_per_epoch=steps,
                num_epochs=num_epochs,
                warmup_epochs=self.args.warmup_epochs,
                warmup_rate=self.args.warmup_learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one batch through the wrapped module; sums up its terms for the log.

        Args:
            model: The wrapped module.
            inputs: Columns of `Batch`.
            return_outputs: Also return the module's outputs.
            num_items_in_batch: Not used; losses are means over a batch.
        """
        outputs = model(**inputs)
        loss = outputs["loss"]
        self._finite.add(outputs, inputs["index"])
        self.running_means.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the mean loss, loss terms and training accuracy of all processes since the last log, or of the run.

        Args:
            logs: Quantities; those of a run's end get the mean loss of the steps made since `train` was called.
            start_time: Of the base class.
        """
        if "loss" in logs:
            logs.pop("loss")  # the base class's stays NaN for good after one step that was left out
            logs |= self.running_means.take()
        if "train_loss" in logs:
            mean = self.running_means.run_loss()
            logs.pop("train_loss")
            logs |= {} if mean is None else {"train_loss": mean}
        super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The base class's ending, its result with the loss that was logged."""
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Logits over all classes, as a user of the trained model gets them; `WithLoss` has the loss."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.model.predict(inputs)
        if prediction_loss_only:
            return nn.functional.cross_entropy(logits.float(), inputs["labels"]), None, None
        return None, logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The base class's loop; predictions are class ids."""
        output = super().evaluation_loop(*args, **kwargs)
        classes = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        return output._replace(predictions=classes)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, with everything needed to use it, from the main process."""
        describe_adapter(self.model.model, self.objective, self.train_dataset)
        super().save_model(output_dir, _internal_call=_internal_call)
