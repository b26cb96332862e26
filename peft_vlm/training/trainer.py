"""`VLMTrainer`: Hugging Face's Trainer around one module of model and objective.

Overrides of its internals live here.
"""

import math
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.objective import EpochBatchSampler, Objective
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.artifacts import ArtifactsCallback, describe_adapter
from peft_vlm.training.callbacks import ObjectiveCallback
from peft_vlm.training.checks import check_run
from peft_vlm.training.module import TrainingModule
from peft_vlm.training.publishing import PublishingTrainer
from peft_vlm.training.resumable import ResumableTrainer
from peft_vlm.training.schedule import epoch_cosine_scheduler


class VLMTrainer(PublishingTrainer, ResumableTrainer):
    """Trains an adapter (or, for baselines, a whole model) by an objective.

    Checkpoints hold the adapter only, plus what an exact resume needs. At the end `output_dir` holds the adapter,
    `metrics.json`, `training_summary.json` and, when matplotlib is installed, `training_curve.png`.

    Args:
        model: `PeftModel` with the adapter to train active, or a plain model.
        objective: What is minimised.
        args: Settings of the run.
        train_dataset: Training images.
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
        train_dataset: ImageClassificationDataset,
        eval_dataset: ImageClassificationDataset | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        check_run(model, objective, eval_dataset)
        if args.n_gpu > 1:  # several visible GPUs without a launcher would mean torch.nn.DataParallel
            args._n_gpu = 1
        self.objective = objective
        self.steps_per_epoch = 0
        self._term_sums: dict[str, float] = {}
        self._term_count = 0
        super().__init__(
            model=TrainingModule(model, objective),
            args=args,
            data_collator=train_dataset.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or accuracy_metric,
            preprocess_logits_for_metrics=predicted_classes,
            callbacks=callbacks,
            **kwargs,
        )
        self.callback_handler.callbacks.insert(
            0, ObjectiveCallback(self.model, train_dataset, self.accelerator.autocast, self.log)
        )
        for callback in (*objective.callbacks(model), ArtifactsCallback(self)):
            self.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        """Batches as the objective composes them, else shuffled; without pixels when the objective caches features."""
        dataset = self.train_dataset if self.objective.needs_pixels else self.train_dataset.without_pixels()
        sampler = self.objective.batch_sampler(
            self.train_dataset.labels, batch_size=self._train_batch_size, seed=self.args.seed
        )
        if sampler is None:
            return self._get_dataloader(
                dataset, "Training", self._train_batch_size, sampler_fn=self._get_train_sampler, is_training=True
            )
        if self.args.world_size > 1:
            sampler = ProcessShard(sampler, self.args.process_index, self.args.world_size)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.collate,
            num_workers=self.args.dataloader_num_workers if self.objective.needs_pixels else 0,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )
        # already sharded: accelerator.prepare would shard again and mistreat batches of different sizes
        return prepare_data_loader(
            loader, device=self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

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
            self.lr_scheduler = epoch_cosine_scheduler(
                optimizer or self.optimizer,
                steps_per_epoch=steps,
                num_epochs=math.ceil(num_training_steps / steps),
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

        Raises:
            FloatingPointError: If the loss is not finite; the message names the images.
        """
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            terms = {key: float(value) for key, value in outputs.items() if key.startswith("loss")}
            raise FloatingPointError(
                f"Expected a finite loss, got {terms!r} at step {self.state.global_step} for the images "
                f"with dataset index "
                f"{inputs['index'].tolist()!r}. Lower the learning rate, or use bf16 or float32 instead of fp16."
            )
        for key, value in outputs.items():
            if key != "loss":
                self._term_sums[key] = self._term_sums.get(key, 0.0) + float(value)
        self._term_count += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the mean loss terms and training accuracy since the last log."""
        if self._term_count and "loss" in logs:
            logs |= {key: value / self._term_count for key, value in self._term_sums.items()}
            self._term_sums, self._term_count = {}, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss and logits over all classes, as a user of the trained model gets them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.model.predict(inputs)
            loss = nn.functional.cross_entropy(logits.float(), inputs["labels"])
        return (loss, None, None) if prediction_loss_only else (loss, logits, inputs["labels"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, with everything needed to use it, from the main process."""
        describe_adapter(self.model.model, self.objective, self.train_dataset)
        super().save_model(output_dir, _internal_call=_internal_call)


class ProcessShard(EpochBatchSampler):
    """Every n-th batch of a sampler, for process `rank` of `world_size`.

    All processes take the same number of steps: where the batches do not divide evenly, the first ones are repeated.

    Args:
        batches: Sampler that draws the same batches on every process.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, batches: EpochBatchSampler, rank: int, world_size: int) -> None:
        super().__init__(batch_size=batches.batch_size, seed=batches.seed)
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world_size)

    def __iter__(self) -> Any:
        batches = list(self.batches)
        for step in range(len(self)):
            yield batches[(step * self.world_size + self.rank) % len(batches)]


def predicted_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Class ids instead of logits, so that evaluation memory does not grow with images times classes."""
    return logits.argmax(dim=-1)


def accuracy_metric(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy in percent."""
    return {"accuracy": 100.0 * float((prediction.predictions == prediction.label_ids).mean())}
