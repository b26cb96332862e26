"""Training under DeepSpeed: what differs from DDP, and what cannot be trained with it.

ZeRO 1 and 2 divide optimizer states and gradients among the processes; every process has all weights. DeepSpeed
makes the update within the backward pass, so nothing sees whole gradients before it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from peft_vlm.errors import CheckpointError

#: Optimizers whose update of a number depends on its own gradients alone, so that tensors may be divided.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)


def check_deepspeed(args: Any) -> None:
    """Refuse what a run under DeepSpeed would drop, or do otherwise than without it.

    Args:
        args: `VLMTrainingArguments`, with a DeepSpeed configuration of their own or of `accelerate launch`.

    Raises:
        ValueError: If ZeRO 1 or 2 cannot do what is asked for.
    """
    config, stage = args.deepspeed_plugin.deepspeed_config, args.deepspeed_plugin.zero_stage
    if stage not in (1, 2):
        reason = {
            0: "that is DDP: use examples/accelerate/ddp.yaml",
            3: "it divides frozen weights that layers, caches, class features and saved files read outside of the "
            "modules where DeepSpeed puts them together. Use FSDP2 (examples/accelerate/fsdp2.yaml)",
        }
        raise ValueError(f"Expected stage 1 or 2 of DeepSpeed's ZeRO, got {stage}: {reason.get(stage, '')}.")
    for name, instead in (("optimizer", "`optim` and `learning_rate`"), ("scheduler", "`lr_schedule`")):
        if name in config:
            raise ValueError(
                f"Expected no {name!r} in the DeepSpeed configuration, got {config[name]!r}: it would take the "
                f"place of the method's parameter groups and rates. Leave it out, and set {instead}."
            )
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"Expected the optimizer's states on the device, got `offload_optimizer` to {offload!r}: DeepSpeed would "
            "put an optimizer of its own in the place of the run's. The states of an adapter are small: leave it out."
        )
    if args.has_sharded_layers:
        raise ValueError("Expected FSDP2 or DeepSpeed, got both. Leave out `fsdp` or `deepspeed`.")
    if args.fp16:
        raise ValueError(
            "Expected no `fp16` with DeepSpeed, whose loss scaling would cast prompts and losses to float16. Use "
            "`bf16=True`, or DDP."
        )
    if args.non_finite == "skip":
        raise ValueError(
            "Expected `non_finite='error'` with DeepSpeed, got 'skip': it has made the update before the loss can be "
            "looked at. Leave it out, or use DDP."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Refuse an optimizer that ZeRO's parts would change, and parameters that DeepSpeed does not see.

    Args:
        optimizer: Optimizer of the run.
        module: Model and objective.

    Raises:
        ValueError: If the method cannot be trained with it.
    """
    name = type(optimizer).__name__
    if type(optimizer) not in ELEMENTWISE:
        raise ValueError(
            f"Expected an optimizer that treats each parameter's numbers one by one, got `{name}`, which is not known "
            "to: ZeRO gives each process a part of a tensor. Use DDP (examples/accelerate/ddp.yaml)."
        )
    inside = {id(parameter) for parameter in module.parameters()}
    apart = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in inside]
    if apart:
        raise ValueError(
            f"Expected an optimizer of the model's parameters, got {len(apart)} of the objective, whose gradients "
            "DeepSpeed does not average. Use DDP (examples/accelerate/ddp.yaml)."
        )


def start_deepspeed(trainer: Any) -> None:
    """Let a trainer's accelerator start DeepSpeed as a run of this package needs it.

    Args:
        trainer: With its accelerator, before its first training.

    Raises:
        ValueError: If it was given an optimizer or a schedule, or trains again.
    """
    found = [type(given).__name__ for given in (trainer.optimizer, trainer.lr_scheduler) if given is not None]
    if found:
        raise ValueError(
            f"Expected no `optimizers` and one training per trainer with DeepSpeed, got {found!r}, which would be "
            "dropped. Give `optimizer_cls_and_kwargs`, or settings of the arguments."
        )
    if trainer.args.bf16:
        _use_autocast(trainer)
    prepare = trainer.accelerator.prepare

    def prepare_model(*objects: Any, **options: Any) -> Any:
        if not any(isinstance(item, nn.Module) for item in objects):
            return prepare(*objects, **options)
        module, optimizer = objects
        check_optimizer(optimizer, module)
        with _scalars_as_rows(module):
            engine, *others = prepare(module, optimizer, **options)
        # transformers writes trained tensors alone, and reads them, where the model itself is a `PeftModel`
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        load = engine.load_checkpoint
        engine.load_checkpoint = lambda *args, **kwargs: load(*args, **(kwargs | {"load_module_strict": False}))
        return (engine, *others)

    trainer.accelerator.prepare = prepare_model


def _use_autocast(trainer: Any) -> None:
    """Compute in bfloat16 as a run under DDP does: weights, prompts and losses stay float32.

    DeepSpeed's own `bf16` casts the module, prompts and projectors included.

    Args:
        trainer: With its accelerator, before DeepSpeed is started.
    """
    plain = copy.copy(trainer.args)
    plain.bf16 = False
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config["bf16"] = {"enabled": False}
    propagate_args_to_deepspeed(trainer.accelerator, plain)  # so that inputs stay float32 too
    trainer.accelerator.native_amp = True
    forward = trainer.model.forward

    def in_bfloat16(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():
            return forward(*args, **kwargs)

    trainer.model.forward = convert_outputs_to_fp32(in_bfloat16)


@contextmanager
def _scalars_as_rows(model: nn.Module) -> Iterator[None]:
    """Within this, scalar parameters (CLIP's `logit_scale`) have one dimension.

    DeepSpeed 0.19 sends parameters to all processes as bytes, which torch refuses for a scalar.

    Args:
        model: Its parameters.
    """
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        parameter.data = parameter.data.reshape(1)
    try:
        yield
    finally:
        for parameter in scalars:
            parameter.data = parameter.data.reshape(())


def check_resume(checkpoint: Path, *, has_new_optimizer: bool) -> None:
    """Refuse a checkpoint without states for DeepSpeed's optimizer, which it does not go on without.

    Args:
        checkpoint: What the run continues from.
        has_new_optimizer: Whether it was written with another optimizer.

    Raises:
        CheckpointError: If there are none.
    """
    if has_new_optimizer or not any(checkpoint.glob("global_step*")):
        what = "one with another optimizer" if has_new_optimizer else "one that was written without DeepSpeed"
        raise CheckpointError(
            f"Expected a checkpoint of this run under DeepSpeed, got {what}: {str(checkpoint)!r}. Go on from it with "
            "DDP (examples/accelerate/ddp.yaml), or start another run."
        )
