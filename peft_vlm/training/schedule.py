"""Optimizer and learning-rate schedule of the Dassl toolbox, on which the official codes of this field are built."""

import math
from typing import Any

import torch
from transformers import Trainer

from peft_vlm.training.arguments import OPTIMIZER_SETTINGS, VLMTrainingArguments, changed_settings
from peft_vlm.training.module import TrainingModule


def build_optimizer(
    module: TrainingModule, *, args: VLMTrainingArguments, given: tuple[Any, dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The objective's own optimizer, or that of the arguments.

    The latter has one parameter group per learning rate, and weight decay on every trainable parameter as in the
    official codes.

    Args:
        module: Model and objective.
        args: Optimizer and its settings.
        given: Class and settings of another one, as `transformers.Trainer` takes them.

    Raises:
        ValueError: If a setting is given that the optimizer does not read.
    """
    own = module.objective.optimizer(module.model, learning_rate=args.learning_rate) if given is None else None
    if own is not None:
        read_by_none = changed_settings(args, OPTIMIZER_SETTINGS)
        for name in (name for name in read_by_none if getattr(args, name) != 0):  # 0 is what it does
            raise ValueError(
                f"Expected no `{name}`, got {getattr(args, name)!r}: `{type(module.objective).__name__}` brings an "
                f"optimizer of its own, `{type(own).__name__}`. Leave it out."
            )
        return own
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for name, parameters in module.objective.param_groups(named).items():
        rate = args.vision_learning_rate if name == "vision" else None
        groups.append({"params": parameters, "lr": args.learning_rate if rate is None else rate})
    groups = [group for group in groups if group["params"]]
    if args.vision_learning_rate is not None and "vision" not in module.objective.param_groups(named):
        raise ValueError(
            f"Expected no `vision_learning_rate`, got {args.vision_learning_rate!r}: "
            f"`{type(module.objective).__name__}` trains with one rate. Leave it out."
        )
    if given is not None:
        return given[0](groups, **given[1])
    if args.has_sgd:
        optimizer_class, options = torch.optim.SGD, {"momentum": args.momentum}
    else:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, module)
        options.pop("lr", None)
    return optimizer_class(groups, lr=args.learning_rate, weight_decay=args.weight_decay, **options)


def epoch_cosine(
    epoch: int, *, learning_rate: float, num_epochs: int, warmup_epochs: int, warmup_rate: float
) -> float:
    """Learning rate of an epoch: constant warm-up, then a cosine whose period is not shortened by the warm-up.

    Args:
        epoch: Number of the epoch, from 0.
        learning_rate: Rate right after the warm-up.
        num_epochs: All epochs of the run, the period of the cosine.
        warmup_epochs: Epochs at the warm-up rate.
        warmup_rate: Rate of those epochs.
    """
    if epoch < warmup_epochs:
        return warmup_rate
    return 0.5 * learning_rate * (1 + math.cos(math.pi * (epoch - warmup_epochs) / num_epochs))


def epoch_cosine_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    steps_per_epoch: int,
    num_epochs: int,
    warmup_epochs: int,
    warmup_rate: float,
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that is stepped per update and changes the rate per epoch; each group starts from its own rate.

    Args:
        optimizer: Optimizer whose groups carry their initial rates.
        steps_per_epoch: Updates per epoch.
        num_epochs: All epochs of the run.
        warmup_epochs: Epochs at the warm-up rate.
        warmup_rate: Rate of those epochs, the same for all groups.
    """

    def factor(rate: float, step: int) -> float:
        epoch = step // steps_per_epoch
        value = epoch_cosine(
            epoch, learning_rate=rate, num_epochs=num_epochs, warmup_epochs=warmup_epochs, warmup_rate=warmup_rate
        )
        return value / rate if rate else 0.0

    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, r=rate: factor(r, step) for rate in rates])
