"""The run that continues compared with the one that was interrupted."""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from peft_vlm.adapters.config import adapter_settings
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.data.splits import content_digest
from peft_vlm.distributed import from_all, num_processes
from peft_vlm.errors import CheckpointError, PeftVLMError, PeftVLMWarning, shown
from peft_vlm.objective import Objective
from peft_vlm.settings import RETIRED_SETTINGS
from peft_vlm.training.checkpoints import read_manifest, step_of
from peft_vlm.training.deepspeed import check_resume
from peft_vlm.training.reports import was_finished

logger = logging.getLogger(__name__)

#: Settings that decide which images a step sees, and in which order.
ORDER = (
    *("seed", "data_seed", "world_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "dataloader_drop_last",
)
#: Settings of the length of a run; a longer one may go on where a shorter one ended.
LENGTH = ("num_train_epochs", "max_steps")
#: Settings that the optimizer and its schedule read in every step.
RATES = (
    *("learning_rate", "vision_learning_rate", "weight_decay", "momentum", "max_grad_norm", *LENGTH),
    *("lr_schedule", "warmup_epochs", "warmup_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"),
)
#: Settings of how a step is computed, which may change its result by rounding alone.
PRECISION = ("fp16", "bf16", "tf32", "activation_checkpointing", "torch_compile")
#: Settings of an objective that say where something is kept, which changes no result.
STORAGE = ("image_cache", "state_cache", "cache_storage", "num_workers")
MAX_NAMES = 200
"""Longest list of class names in a manifest; a longer one is recorded by its digest."""


def order_of(images: Any, args: Any) -> dict[str, Any]:
    """What decides which images a step sees, and in which order.

    Args:
        images: Training images.
        args: Settings of the run.
    """
    # the workers of a stream divide its rows
    names = ORDER if images.has_positions else (*ORDER, "dataloader_num_workers")
    return {name: getattr(args, name) for name in names} | images.order_facts()


def settings_of(model: nn.Module, objective: Objective) -> dict[str, Any]:
    """Settings of adapter and objective as JSON values.

    Args:
        model: `PeftModel`, or a plain model.
        objective: What is minimised.
    """
    own = adapter_settings(model.active_peft_config) if isinstance(model, PeftModel) else {}
    return _json(own | objective.config_dict())


def identity_of(model: nn.Module, objective: Objective, images: Any, *, optimizer: str) -> dict[str, Any]:
    """What makes a run this run: model, objective, classes, images, how they are prepared, and optimizer.

    Args:
        model: `PeftModel`, or a plain model.
        objective: What is minimised.
        images: Training images.
        optimizer: Name of the optimizer.

    Returns:
        JSON values by name.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    prompts = objective.prompts
    found = {
        "objective": type(objective).__name__,
        "adapter": config and str(config.peft_type.value),
        "base_digest": getattr(config, "base_digest", None),
        "optimizer": optimizer,
        "class_names": _names(images.class_names if prompts is None else prompts.class_names),
        "templates": None if prompts is None else list(prompts.templates),
        "images": len(images),
        "content": content_digest(images) if isinstance(images, ImageClassificationDataset) else None,
        "questions": images.text_digest() if isinstance(images, ImageQuestionDataset) else None,
        "value_range": getattr(images, "value_range", None),
        "transform": _transform_facts(getattr(images, "augmentation", None) or images.transform),
    }
    return _json(found)


def _names(names: Any) -> Any:
    if len(names) <= MAX_NAMES:
        return list(names)
    return f"{len(names)} names, digest {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:12]}"


def _transform_facts(transform: Any) -> Any:
    """Kind and settings of a transform; of a user's own, its name and what it holds of plain values."""
    if transform is None:
        return None
    if isinstance(transform, Mapping):
        return {str(key): _transform_facts(value) for key, value in transform.items()}
    if isinstance(transform, list | tuple):
        return [_transform_facts(value) for value in transform]
    if isinstance(transform, bool | int | float | str):
        return transform
    kind = getattr(transform, "__qualname__", type(transform).__qualname__)
    held = transform.to_dict() if hasattr(transform, "to_dict") else getattr(transform, "__dict__", {})
    facts = {str(name): value for name, value in held.items() if not str(name).startswith("_")}
    return {"kind": kind, **{name: _transform_facts(value) for name, value in facts.items()}}


def rates_of(args: Any) -> dict[str, Any]:
    """Settings that the optimizer and its schedule read in every step, as JSON values.

    Args:
        args: Settings of the run.
    """
    return _json({name: getattr(args, name) for name in RATES})


def precision_of(args: Any) -> dict[str, Any]:
    """Settings of how a step is computed, as JSON values.

    Args:
        args: Settings of the run.
    """
    return _json({name: getattr(args, name) for name in PRECISION})


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> list[str]:
    """Differences between two records, one text each; entries that the earlier one lacks do not count.

    Args:
        before: Earlier record.
        now: That of this run.
        found: What training had filled into the earlier record.
    """
    found = found or {}
    names = [name for name in before if name not in RETIRED_SETTINGS]
    changed = sorted(name for name in names if now.get(name) not in (before[name], found.get(name, before[name])))
    pairs = [(name, before[name], now.get(name)) for name in changed]
    return [f"{name} was {_cut(earlier, later)} and is {_cut(later, earlier)}" for name, earlier, later in pairs]


def _cut(value: Any, other: Any) -> str:
    """A value for a message; of records and long lists, what differs from the other one."""
    if isinstance(value, list) and isinstance(other, list) and value != other and len(value) > 3:
        place = next((i for i, pair in enumerate(zip(value, other, strict=False)) if pair[0] != pair[1]), len(other))
        value = value[place : place + 3]
        return f"{shown(value)} at {place}"
    return shown(_part(value, other))


def _part(value: Any, other: Any) -> Any:
    """The entries of a record that another one does not have."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {name: _part(entry, other.get(name)) for name, entry in value.items() if other.get(name) != entry}


def check_changes(
    checkpoint: Path, facts: Mapping[str, Any], *, has_optimizer: bool, choice: str, has_reports: bool
) -> list[str]:
    """Refuse to go on as another run, or say how the resumed run differs from the interrupted one.

    A run that was finished, with its reports, is not refused: nothing is trained, and its files stay as they are.

    Args:
        checkpoint: What the run continues from.
        facts: This run's entries of the manifest: `order`, `settings`, `identity`, `rates`, `precision`. Settings are
            those before training fills in what it finds.
        has_optimizer: Whether the checkpoint holds an optimizer that this run can read.
        choice: `resume_changes` of the arguments.
        has_reports: Whether the reports of this checkpoint's run are written.

    Returns:
        All changes that the run has seen, a text each.

    Raises:
        CheckpointError: If the run is another one, and `choice` is `"error"`; or if it has ended, and its reports
            would name rates that no step was made with.
    """
    manifest, step = read_manifest(checkpoint), step_of(checkpoint)
    if "identity" not in manifest:
        logger.info("%s is of an earlier version, which recorded less: images and rates are not compared.", checkpoint)
    settings = changes(manifest.get("settings", {}), facts["settings"], manifest.get("settings_found"))
    kept = [text for text in settings if text.partition(" ")[0] in STORAGE]
    identity = _identity_changes(manifest.get("identity", {}), facts["identity"])
    other = [text for text in settings if text not in kept] + identity
    has_ended = _has_ended(manifest, facts["rates"], step)
    is_finished = has_ended and has_reports
    if other and choice == "error" and not is_finished:
        raise CheckpointError(
            f"Expected the run of {str(checkpoint)!r} to go on as it was, but {', '.join(other)}. Put back what was, "
            "start another run in another folder, or go on nevertheless with `resume_changes='warn'`."
        )
    rates = changes(manifest.get("rates", {}), facts["rates"])
    if rates and has_ended and not has_reports:
        raise CheckpointError(
            f"Expected the rates of the run of {str(checkpoint)!r}, which has ended and lacks its reports, but "
            f"{', '.join(rates)}. Put them back, so that the reports tell what was done."
        )
    order = changes(manifest.get("order", {}), facts["order"])
    problems = [f"sees other batches than it would have: {', '.join(order)}"] if order else []
    problems += [f"has other settings: {', '.join([*kept, *other])}"] if kept or other else []
    if not is_finished:
        kind = changes(manifest.get("precision", {}), facts["precision"])
        shown_rates = [text for text in rates if text.partition(" ")[0] not in LENGTH]
        problems += [f"computes otherwise: {', '.join(kind)}"] if kind else []
        problems += [f"has other rates from here on: {', '.join(shown_rates)}"] if shown_rates else []
    if not has_optimizer:
        problems.append("begins with a new optimizer and schedule: the checkpoint has none that this run can load")
    if problems:
        message = f"The run goes on from {checkpoint.name}, but {'; and it '.join(problems)}."
        warnings.warn(message, PeftVLMWarning, stacklevel=3)
    new = [] if is_finished else [f"from step {step} on, {text}" for text in (*other, *kept, *rates, *order)]
    return [*manifest.get("changes", []), *new]


def _identity_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = changes(before, now)
    kinds = [str(facts.get("base_digest")).rpartition("/")[0] for facts in (before, now)]
    if kinds[0] != kinds[1]:  # digests of other precisions say nothing about each other
        found = [text for text in found if not text.startswith("base_digest ")]
    return found


def _has_ended(manifest: Mapping[str, Any], rates: Mapping[str, Any], step: int) -> bool:
    """Tell whether a run had made all its steps, and is not to be longer now."""
    before, last = manifest.get("rates", {}), manifest.get("last_step")
    return isinstance(last, int) and step >= last and all(before.get(name) == rates[name] for name in LENGTH)


@contextmanager
def without_optimizer(checkpoint: Path, *, leave_out: bool) -> Iterator[Path]:
    """Yield a checkpoint to load from, where another optimizer is wanted a copy without the state of the old one.

    Args:
        checkpoint: Checkpoint.
        leave_out: False yields the checkpoint itself.
    """
    if not leave_out:
        yield checkpoint
        return
    with TemporaryDirectory(prefix="peft-vlm-") as folder:
        ignore = shutil.ignore_patterns(OPTIMIZER_NAME, SCHEDULER_NAME)
        yield Path(shutil.copytree(checkpoint, Path(folder) / checkpoint.name, ignore=ignore))


#: Numbers of a parameter group that a user sets, in the optimizers of torch and their kin.
_NUMBERS = ("initial_lr", "momentum", "dampening", "nesterov", "weight_decay", "betas", "eps", "alpha", "lr_decay")

Groups = list[dict[str, Any]]


def groups_of(optimizer: torch.optim.Optimizer) -> Groups:
    """Return the settings of each parameter group.

    Args:
        optimizer: Optimizer with its schedule, which has noted the initial rates.
    """
    return [{name: group[name] for name in _NUMBERS if name in group} for group in optimizer.param_groups]


def use_own_rates(optimizer: torch.optim.Optimizer, scheduler: Any, wanted: Groups, *, is_other_length: bool) -> None:
    """Give a restored optimizer and its schedule the rates of this run; restoring has put those of the checkpoint.

    Args:
        optimizer: With the state of the checkpoint.
        scheduler: Likewise.
        wanted: Of `groups_of`, before they were restored.
        is_other_length: Whether the schedule runs over another number of steps, or follows another rule.

    Raises:
        PeftVLMError: If the schedule is of a kind whose rates cannot be changed on the way.
    """
    found = groups_of(optimizer)
    if found == wanted and not is_other_length:
        return
    for group, own in zip(optimizer.param_groups, wanted, strict=True):
        group.update(own)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        if [g.get("initial_lr") for g in found] != [g.get("initial_lr") for g in wanted]:
            raise PeftVLMError(
                f"Expected the learning rates of the checkpoint under a `{type(scheduler).__name__}`, which does not "
                f"tell the rate of a step, got {wanted!r} for {found!r}. Put them back, or start another run."
            )
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    rules = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, rate, rule in rules:
        group["lr"] = rate * rule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def name_of_optimizer(args: Any, optimizer: Any, given: tuple[Any, dict[str, Any]] | None) -> str:
    """Return the name of the optimizer that was handed to the trainer, or of the one that the arguments choose.

    Args:
        args: Settings of the run.
        optimizer: The optimizer that was handed over, if any.
        given: Class and settings of one, if any.
    """
    if optimizer is not None:
        return type(optimizer).__name__
    if given is not None:
        return str(getattr(given[0], "__name__", given[0]))
    return str(getattr(args.optim, "value", args.optim))


#: Arguments that say something of one process alone, or of what it prints.
OF_ONE_PROCESS = frozenset(
    ("local_rank", "run_name", "hub_token", "disable_tqdm", "log_level", "log_level_replica", "report_to", "deepspeed")
)


def _lengths(images: Any) -> Any:
    """Numbers of images of one dataset or several by name."""
    if isinstance(images, Mapping):
        return {name: _lengths(part) for name, part in images.items()}
    return None if images is None else len(images)


def _nested_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between two records of records, without the names of the outer ones."""
    found = changes(before, now)
    for name, value in before.items():
        if isinstance(value, dict) and isinstance(now.get(name), dict) and value != now[name]:
            found = [text for text in found if not text.startswith(f"{name} was ")] + changes(value, now[name])
    return sorted(set(found))


class RunRecord:
    """What a run is, as its checkpoints record it, and how it differs from the run that it continues.

    Args:
        trainer: The trainer it belongs to.
        optimizer: Name of its optimizer.
    """

    def __init__(self, trainer: Any, *, optimizer: str) -> None:
        self.trainer, self.optimizer = trainer, optimizer
        #: Before training fills in what it finds.
        self.settings = settings_of(trainer.image_model, trainer.objective)
        self._identity: dict[str, Any] = {}
        self._rates: Groups = []
        self.start()

    def start(self) -> None:
        """Forget an earlier run."""
        #: All changes that the run has seen in its resumes, a text each.
        self.changes: list[str] = []
        self.has_new_optimizer, self._has_new_schedule = False, False

    def facts(self) -> dict[str, Any]:
        """Entries of a manifest; some images are read for them, once."""
        trainer = self.trainer
        if not self._identity:
            images = trainer.train_dataset
            self._identity = identity_of(trainer.image_model, trainer.objective, images, optimizer=self.optimizer)
        return {
            "identity": self._identity,
            "order": order_of(trainer.train_dataset, trainer.args),
            "settings": self.settings,
            "rates": rates_of(trainer.args),
            "precision": precision_of(trainer.args),
        }

    def check_agreement(self, resume: Any) -> None:
        """Stop on all processes, before they work, if they were started as different runs; all must call this.

        Args:
            resume: Where this process is to go on.

        Raises:
            PeftVLMError: Naming what differs, and where.
        """
        if num_processes() == 1:
            return
        trainer = self.trainer
        parameters = [(name, tuple(p.shape)) for name, p in trainer.model.named_parameters() if p.requires_grad]
        facts = self.facts()
        own = {f"`{name}`": value for name, value in trainer.args.to_dict().items() if name not in OF_ONE_PROCESS}
        own |= {name: facts[name] for name in ("identity", "order", "settings")}
        own |= {"trainable parameters": parameters, "`resume_from_checkpoint`": str(resume)}
        own["evaluation images"] = _lengths(trainer.eval_dataset)
        for index, other in enumerate(everywhere := from_all(_json(own))):
            if found := _nested_changes(everywhere[0], other):
                raise PeftVLMError(
                    f"Expected one run in {len(everywhere)} processes, got another one in process {index} than in "
                    f"process 0: {', '.join(found)} there. Start all of them with the same settings and images."
                )

    def compare(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another run, or note how this one differs.

        Args:
            checkpoint: What the run continues from.
        """
        trainer, facts, before = self.trainer, self.facts(), read_manifest(checkpoint)
        self.changes = check_changes(
            checkpoint,
            facts,
            has_optimizer=trainer.is_deepspeed_enabled or (checkpoint / OPTIMIZER_NAME).is_file(),
            choice=trainer.args.resume_changes,
            has_reports=was_finished(trainer, step_of(checkpoint)),
        )
        self.has_new_optimizer = before.get("identity", {}).get("optimizer", self.optimizer) != self.optimizer
        if trainer.is_deepspeed_enabled:
            check_resume(checkpoint, has_new_optimizer=self.has_new_optimizer)
        self._has_new_schedule = before.get("rates", facts["rates"]) != facts["rates"]

    def note_rates(self, optimizer: Any) -> None:
        """Keep the rates of this run, which the state of a checkpoint then replaces.

        Args:
            optimizer: New optimizer with its schedule.
        """
        self._rates = groups_of(optimizer)

    def use_own_rates(self) -> None:
        """Give the restored optimizer and schedule the rates of this run again."""
        trainer = self.trainer
        if trainer.first_step:
            options = {"is_other_length": self._has_new_schedule}
            use_own_rates(trainer.optimizer, trainer.lr_scheduler, self._rates, **options)
