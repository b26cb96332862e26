"""What a training run needs: Hugging Face's `TrainingArguments` with the defaults and additions of this field."""

import os
from dataclasses import dataclass, field
from typing import no_type_check

from transformers import TrainingArguments

from peft_vlm.errors import check_choice

#: Settings with a choice of words.
CHOICES = {
    "lr_schedule": ("epoch_cosine", "transformers"),
    "non_finite": ("error", "skip"),
    "unreadable_images": ("error", "skip"),
    "resume_changes": ("error", "warn"),
    "train_sampling_strategy": ("random",),  # objectives and processes share the batches, see `batches.py`
}


@no_type_check  # transformers converts the types of its fields itself
@dataclass
class VLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults follow prompt-tuning practice; every other field works as in transformers.

    Changed defaults: SGD, weight decay 5e-4 on every trained tensor, no gradient clipping, learning rate 2e-3, batch
    4, a checkpoint per epoch of which two are kept, about fifty lines of log over the run whatever its length, and
    non-finite losses are errors instead of being averaged away.

    Args:
        vision_learning_rate: Learning rate of the objective's `vision` parameter group; None uses `learning_rate`.
        momentum: Momentum of `optim="sgd"`.
        lr_schedule: `"epoch_cosine"` changes the rate once per epoch: `warmup_epochs` at `warmup_learning_rate`, then
            0.5 lr (1 + cos(pi (e - warmup_epochs) / num_train_epochs)). The period is not shortened by the warm-up,
            as in the Dassl toolbox of the official codes, so the last rate is not 0. `"transformers"` uses
            `lr_scheduler_type`.
        warmup_epochs: Epochs at the warm-up rate, 0 by default; the official presets set 1. A run must be longer.
        warmup_learning_rate: Constant rate of the warm-up epochs, the same for every parameter group.
        non_finite: A step with a loss or gradient that is not finite: `"error"` names its images and stops, `"skip"`
            leaves the update out and counts it.
        unreadable_images: Training images that cannot be read: `"error"` stops, `"skip"` takes the next image of the
            class in their place and counts them.
        resume_changes: A resume as another run, with other classes, images, transform, settings of the method or
            optimizer: `"error"` refuses it, `"warn"` goes on and records what has changed.
        hub_license: Licence of the published adapter, as the Hub spells it.
        hub_strategy: `"end"` publishes when `push_to_hub` or `save_model` is called after training; `"checkpoint"` and
            `"all_checkpoints"` upload unfinished checkpoints as well, into folders of their own.
    """

    vision_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of vision parameters."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of optim='sgd'."})
    lr_schedule: str = field(default="epoch_cosine", metadata={"help": "'epoch_cosine' or 'transformers'."})
    warmup_epochs: int = field(default=0, metadata={"help": "Epochs at the constant warm-up rate."})
    warmup_learning_rate: float = field(default=1e-5, metadata={"help": "Rate of the warm-up epochs."})
    hub_license: str | None = field(default=None, metadata={"help": "Licence of the published adapter."})

    hub_strategy: str = field(default="end", metadata={"help": "'end', 'checkpoint' or 'all_checkpoints'."})
    non_finite: str = field(default="error", metadata={"help": "Non-finite steps: 'error' or 'skip'."})
    unreadable_images: str = field(default="error", metadata={"help": "Damaged images: 'error' or 'skip'."})

    resume_changes: str = field(default="error", metadata={"help": "A resume as another run: 'error' or 'warn'."})

    optim: str = field(default="sgd", metadata={"help": "Optimizer, any that transformers knows."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Initial learning rate."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of every trained tensor."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 switches it off."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images per process and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per process in evaluation."})
    save_strategy: str = field(default="epoch", metadata={"help": "When checkpoints are written."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps per line of log; below 1: share of the run."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Objectives choose their columns."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Label column."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every trained tensor is used."})

    def __post_init__(self) -> None:
        if self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
            raise ValueError(
                "Expected a run without FSDP, which divides the tensors that caches, class features and evaluation "
                "read outside the wrapped module. Use DDP (examples/accelerate/ddp.yaml) with `bf16=True` and "
                "`gradient_checkpointing=True`, or a quantised base model."
            )
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher in ("fp16", "bf16") and not (self.fp16 or self.bf16):
            setattr(self, launcher, True)  # what computes must also be what is checked and reported
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # several visible GPUs without a launcher would mean torch.nn.DataParallel
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "Expected fp16=True only on a GPU, got a CPU run, where it is silently ignored. Use "
                "bf16=True, or neither."
            )
        if self.push_to_hub and self.hub_strategy == "every_save":
            raise ValueError(
                "Expected `hub_strategy` 'end', 'checkpoint' or 'all_checkpoints', got 'every_save': an adapter is "
                "published when it is finished and evaluated."
            )
        if self.warmup_epochs < 0 or self.warmup_learning_rate < 0:
            raise ValueError(
                f"Expected `warmup_epochs` and `warmup_learning_rate` of 0 or more, got {self.warmup_epochs!r} and "
                f"{self.warmup_learning_rate!r}."
            )


# `HfArgumentParser` reads the types of the fields, which the decorator hides from everybody, not only from beartype.
del VLMTrainingArguments.__no_type_check__
