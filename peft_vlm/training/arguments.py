"""What a training run needs: Hugging Face's `TrainingArguments` with the defaults and additions of this field."""

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, no_type_check

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from peft_vlm.errors import check_choice, shown
from peft_vlm.training.deepspeed import check_deepspeed

#: Settings with a choice of words.
CHOICES = {
    "lr_schedule": ("epoch_cosine", "transformers"),
    "non_finite": ("error", "skip"),
    "unreadable_images": ("error", "skip"),
    "decoded_images": ("none", "ram", "disk"),
    "resume_changes": ("error", "warn"),
    "train_sampling_strategy": ("random",),  # objectives and processes share the batches, see `batches.py`
}


#: Settings of transformers that nothing here would read, each with what to do.
REFUSED = {
    "label_smoothing_factor": "the objective is the loss; write an `Objective` that smooths its labels",
    "neftune_noise_alpha": "it adds noise to every token embedding, learned ones included",
    "remove_unused_columns": "a dataset makes its batches itself, with the columns that its objective reads",
    "label_names": "the column is `labels` in every batch",
    "length_column_name": "it is read for batches by length alone, and an objective composes its batches itself",
    "optim_target_modules": "it is read by optimizers for full fine-tuning alone",
    "average_tokens_across_devices": "losses are means over images, weighted by the images of each process",
    "use_liger_kernel": "its kernels replace layers that adapters wrap",
    "liger_kernel_config": "its kernels replace layers that adapters wrap",
    "use_cache": "training reads no cache of keys and values",
    "auto_find_batch_size": "an error names what to lower, and a run goes on with `resume_from_checkpoint='auto'`",
    "logging_nan_inf_filter": "a loss that is not finite is handled by `non_finite`",
    "include_num_input_tokens_seen": "images are counted, not tokens",
    "eval_do_concat_batches": "metrics need the logits of all images; `batch_eval_metrics` takes them batch by batch",
    "save_on_each_node": "the main process writes checkpoints, to a place that all nodes see",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C write a checkpoint by themselves",
    "parallelism_config": "class features and caches need whole layers in each process; use DDP, or `fsdp=True`",
    "fsdp_config": "`fsdp=True` divides the frozen transformer layers, and nothing about it can be chosen",
}
#: Values of these that mean the same as their default, as the base class leaves them or another spelling.
_SAME = {"include_num_input_tokens_seen": (False, "no"), "fsdp_config": ({},), "label_names": (["labels"], None)}
#: Settings of accelerate's data loaders, which divide what is divided here already.
REFUSED_BY_LOADERS = {"split_batches": False, "dispatch_batches": None, "even_batches": True}

#: Settings of FSDP in a launcher's file: the values that a run here has, or that mean nothing, and what to do.
FSDP_SETTINGS = {
    "FSDP_VERSION": (("2",), "layers are divided by FSDP2"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true",), "layers without a backward pass, as in evaluation, would stay whole"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "weights stay on the GPUs; use more of them, or a quantised base model"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("false",), "every process reads the weights, and keeps its part"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "pass `--gradient_checkpointing` to the script"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "pass `--gradient_checkpointing` to the script"),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "each transformer layer is a unit"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (("", "none"), "each transformer layer is a unit, whatever its class"),
    "FSDP_IGNORED_MODULES": (("", "none"), "trainable parameters stay whole, and nothing else can be chosen"),
}

_ACCELERATE_FSDP, _FSDP = "ACCELERATE_USE_FSDP", "PEFT_VLM_USE_FSDP"

INTEGER, NUMBER = Integral, Real
#: Type of a number, and its smallest and largest value; `None` is allowed where it is the default.
RANGES: dict[str, tuple[type, float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (INTEGER, 1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit"), (INTEGER, 1, math.inf)),
    **dict.fromkeys(("dataloader_prefetch_factor", "eval_accumulation_steps"), (INTEGER, 1, math.inf)),
    **dict.fromkeys(("torch_empty_cache_steps", "ddp_timeout", "ddp_bucket_cap_mb"), (INTEGER, 1, math.inf)),
    **dict.fromkeys(("warmup_epochs", "dataloader_num_workers"), (INTEGER, 0, math.inf)),
    **dict.fromkeys(("learning_rate", "vision_learning_rate", "warmup_learning_rate"), (NUMBER, 0, math.inf)),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), (NUMBER, 0, math.inf)),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), (NUMBER, 0, math.inf)),
    **dict.fromkeys(("momentum", "adam_beta1", "adam_beta2", "adam_epsilon"), (NUMBER, 0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (INTEGER, 0, 2**32 - 1)),
    "max_steps": (INTEGER, -1, math.inf),
}
#: Settings that the optimizer of the arguments reads.
OPTIMIZER_SETTINGS = ("optim", "weight_decay", "momentum", "vision_learning_rate")
#: Settings that one kind of optimizer or schedule reads alone.
_OF_SGD = ("momentum",)
_OF_OTHERS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
_OF_EPOCH_COSINE = ("warmup_epochs", "warmup_learning_rate")
_OF_TRANSFORMERS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


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
        decoded_images: Training images are decoded once and kept as 8-bit RGB, in memory (`"ram"`) or in a
            memory-mapped file (`"disk"`) that all workers share; worth it for large photos. `"none"`: each epoch
            decodes them. The pixels are the same.
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
    decoded_images: str = field(default="none", metadata={"help": "Keep decoded images: 'none', 'ram' or 'disk'."})
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
        _check_numbers(self)
        self._take_fsdp()
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher in ("fp16", "bf16") and not (self.fp16 or self.bf16):
            setattr(self, launcher, True)  # what computes must also be what is checked and reported
        if self.ddp_backend and int(os.environ.get("LOCAL_RANK", "-1")) < 0:
            raise ValueError(
                f"Expected `ddp_backend` only where a launcher starts processes, got {self.ddp_backend!r} in a run of "
                "one process. Leave it out, or start with `torchrun` or `accelerate launch`."
            )
        super().__post_init__()
        self._check_processes()
        _check_unread(self)
        if self.has_sharded_layers:  # hidden from the base class; for those who copy or read the settings
            self.fsdp, self.fsdp_config = True, {}
        if self.deepspeed_plugin is not None:
            check_deepspeed(self)
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

    def _take_fsdp(self) -> None:
        """Take FSDP over from transformers and accelerate, which would wrap the whole model, scalars included.

        The trainer divides the frozen layers itself, and accelerate runs DDP for the trainable parameters.
        """
        if os.environ.get(_ACCELERATE_FSDP, "false").lower() in ("true", "1"):
            os.environ[_FSDP] = os.environ.pop(_ACCELERATE_FSDP)  # for the next arguments, and hidden from accelerate
        by_launcher = _FSDP in os.environ
        value = self.fsdp.lower() if isinstance(self.fsdp, str) else self.fsdp  # a word of the command line
        self.has_sharded_layers = (bool(value) and value != "false") or by_launcher
        if not self.has_sharded_layers:
            self.fsdp = None
            return
        if value not in (None, "", "false", True, "true", "full_shard", "full_shard auto_wrap"):
            raise ValueError(
                f"Expected `fsdp` to be True, got {shown(self.fsdp)}: frozen transformer layers are divided, and "
                "nothing else can be chosen."
            )
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()  # of `dynamo_config` in a launcher's file
        if self.torch_compile or backend != "no":
            got = "True" if self.torch_compile else f"the backend {shown(backend)} of the launcher or an earlier run"
            reason = "where compiled steps were not tried"
            raise ValueError(f"Expected no `torch_compile` with `fsdp`, {reason}, got {got}. Leave it out.")
        for name, (allowed, advice) in FSDP_SETTINGS.items() if by_launcher else ():
            value = os.environ.get(name, allowed[0])
            if value.lower() not in allowed:
                setting = f"{name.lower()}: {allowed[0]}"
                raise ValueError(f"Expected `{setting}` in the launcher's file, got {shown(value)}: {advice}.")
        self.fsdp = None

    def _check_processes(self) -> None:
        """Refuse processes that a launcher started together and that would train apart, each on its own."""
        if self.has_sharded_layers and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                "Expected several processes to divide the frozen layers among (`fsdp`), got one. Start them with "
                "`torchrun` or `accelerate launch --config_file examples/accelerate/fsdp2.yaml`."
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(
                f"Expected {started} processes to train together, got processes on {self.device.type!r} that do not "
                "average their gradients: without a GPU for them they need `use_cpu=True` (`--use_cpu`)."
            )

    @property
    def has_sgd(self) -> bool:
        """Whether `optim` is torch's SGD, with `momentum`."""
        return getattr(self.optim, "value", self.optim) == "sgd"


def changed_settings(args: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of some settings that have another value than by default.

    Args:
        args: `VLMTrainingArguments`.
        names: Names of settings.
    """
    default = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    values = {name: getattr(args, name) for name in names}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    return [name for name in names if plain[name] not in (default[name], *_SAME.get(name, ()))]


def _check_numbers(args: Any) -> None:
    """Refuse numbers that no run could use, and words where True or False belongs."""
    for name, (kind, low, high) in RANGES.items():
        value: Any = getattr(args, name)
        if value is None and None in (getattr(TrainingArguments, name, 0), getattr(type(args), name)):
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= float(value or 0) <= high or math.isinf(value):
            what = "an integer" if kind is INTEGER else "a number"
            limit = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
            raise ValueError(f"Expected `{name}` to be {what} {limit}, got {shown(value)}.")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs):
        raise ValueError(
            f"Expected a run with steps, got `max_steps`={args.max_steps!r} and `num_train_epochs`="
            f"{args.num_train_epochs!r}. Leave `max_steps` at -1 to train for epochs."
        )
    for item in fields(args):
        if isinstance(item.default, bool) and not isinstance(getattr(args, item.name), bool):
            if item.name not in _SAME:
                raise ValueError(f"Expected `{item.name}` to be True or False, got {shown(getattr(args, item.name))}.")


def _check_unread(args: Any) -> None:
    """Refuse settings that nothing would read."""
    for name in changed_settings(args, tuple(REFUSED)):
        raise ValueError(f"Expected no `{name}`, got {shown(getattr(args, name))}: {REFUSED[name]}.")
    if "inputs" in args.include_for_metrics:
        raise ValueError("Expected no 'inputs' in `include_for_metrics`: metrics get logits and labels, not images.")
    for name, default in REFUSED_BY_LOADERS.items():
        value = getattr(args.accelerator_config, name)
        if value != default:
            raise ValueError(
                f"Expected no `{name}` in `accelerator_config`, got {value!r}: batches are divided among the "
                "processes by this package, evenly and by position."
            )
    pairs = (
        (args.has_sgd, "`optim='sgd'`", _OF_OTHERS, "the optimizers of transformers"),
        (not args.has_sgd, f"`optim={getattr(args.optim, 'value', args.optim)!r}`", _OF_SGD, "`optim='sgd'`"),
        (args.lr_schedule == "epoch_cosine", "`lr_schedule='epoch_cosine'`", _OF_TRANSFORMERS, "'transformers'"),
        (args.lr_schedule == "transformers", "`lr_schedule='transformers'`", _OF_EPOCH_COSINE, "'epoch_cosine'"),
    )
    for applies, under, names, where in pairs:
        for name in changed_settings(args, names) if applies else ():
            raise ValueError(
                f"Expected no `{name}` under {under}, which does not read it, got {shown(getattr(args, name))}. Leave "
                f"it out, or choose {where}."
            )


# `HfArgumentParser` reads the types of the fields, which the decorator hides from everybody, not only from beartype.
del VLMTrainingArguments.__no_type_check__
