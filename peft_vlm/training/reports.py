"""What a run leaves behind: adapter, metrics, summary, card and curve, and their way to the Hub."""

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from peft_vlm.adapters.config import VLMConfig, architecture_of, installed_version
from peft_vlm.data.dataset import ImageClassificationDataset, RunImages
from peft_vlm.data.splits import image_sample
from peft_vlm.distributed import all_agree
from peft_vlm.errors import CheckpointError
from peft_vlm.evaluation.plots import has_matplotlib, new_figure, save_figure, set_log_scale
from peft_vlm.files import (
    CARD_NAME,
    CURVE_NAME,
    METRICS_NAME,
    SUMMARY_NAME,
    WEIGHTS_NAME,
    finite_or_null,
    write_json,
)
from peft_vlm.hub.card import write_card
from peft_vlm.hub.publish import Published, publish, saved_adapter
from peft_vlm.models.towers import unwrap
from peft_vlm.objective import Objective, record_data
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.checkpoints import MANIFEST_NAME, numbered_checkpoints


def training_curve_png(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot loss, its terms where there are several, and, where logged, accuracy over the epochs.

    Args:
        history: `trainer.state.log_history`.
        path: PNG file to write.
    """
    terms = list(dict.fromkeys(key for entry in history for key in entry if key.startswith("loss_")))
    panels = {
        "loss": {"loss": "training", "eval_loss": "validation"},
        "terms of the loss, unweighted": {key: key.removeprefix("loss_").replace("_", " ") for key in terms},
        "accuracy (%)": {"accuracy": "training batches", "eval_accuracy": "validation"},
    }
    if len(terms) < 2:
        del panels["terms of the loss, unweighted"]
    figure = new_figure(4.5 * len(panels), 3.5)
    for axes, (label, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        values = []
        for key, name in series.items():
            points = [(entry["epoch"], entry[key]) for entry in history if key in entry and "epoch" in entry]
            values += [value for _, value in points]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else None)
        if label.startswith("terms") and values and min(values) > 0 and max(values) > 20 * min(values):
            set_log_scale(axes.yaxis)  # terms of other sizes would lie on the axis
        axes.set(xlabel="epoch", ylabel=label)
        if values:
            axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


REPORTED_ARGUMENTS = (
    *(
        "learning_rate",
        "vision_learning_rate",
        "lr_schedule",
        "warmup_epochs",
        "warmup_learning_rate",
        "optim",
        "momentum",
    ),
    *("weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "seed", "fp16", "bf16", "gradient_checkpointing", "max_grad_norm"),
)


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "peft_vlm": installed_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


class ArtifactsCallback(TrainerCallback):
    """Writes the final adapter and the reports into `output_dir` when training ends.

    Args:
        trainer: The trainer it belongs to.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter, `metrics.json`, `training_summary.json`, the card and, with matplotlib, the curve.

        The other processes wait, so that each may read the folder when its `train()` returns. A finished run that is
        started again, and makes no step, leaves its files as they are.
        """
        folder, failure = Path(args.output_dir), None
        if state.global_step > self.trainer.first_step or not was_finished(self.trainer, state.global_step):
            try:
                self.trainer.save_adapter(folder, reports=partial(self.write_reports, args, state))
            except CheckpointError as error:
                failure = error
        if not all_agree(failure is None):
            raise failure or CheckpointError("Expected the results of the run, but the main process could not write.")

    def write_reports(self, args: TrainingArguments, state: TrainerState, folder: Path) -> None:
        """What lies beside the weights.

        Args:
            args: Settings of the run.
            state: State at its end.
            folder: Where the adapter has been written to, before all is moved to its place.
        """
        reports = {
            METRICS_NAME: {"final": _final_metrics(state), "history": state.log_history},
            SUMMARY_NAME: self.summary(args, state),
        }
        for name, report in reports.items():  # a step that was left out logs a gradient that is not finite
            write_json(folder / name, finite_or_null(report), allow_nan=False)
        if has_matplotlib():
            training_curve_png(state.log_history, folder / CURVE_NAME)
        adapter = saved_adapter(self.trainer.model.model, folder)
        if adapter is not None:
            place = saved_adapter(self.trainer.model.model, args.output_dir)
            write_card(adapter, license=args.hub_license, place=place)

    def summary(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Everything about the run that is not needed to rebuild the adapter.

        Args:
            args: Settings of the run.
            state: State at its end.
        """
        objective, dataset = self.trainer.objective, self.trainer.train_dataset
        sample = image_sample(dataset) if isinstance(dataset, ImageClassificationDataset) else []
        return {
            "method": type(objective).__name__.removesuffix("Objective"),
            "paper": objective.paper and {"title": objective.paper.title, "url": objective.paper.url},
            "objective": objective.config_dict(),
            "training": {name: _plain(getattr(args, name)) for name in REPORTED_ARGUMENTS},
            "data": self._data(),
            "training_images": {"count": len(dataset), "sample": sample},
            "trainable_parameters": sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad),
            "steps": state.global_step,
            "changes": self.trainer.record.changes,
            "epochs": state.epoch,
            "selection": self._selection(args),
            "best_checkpoint": state.best_model_checkpoint and Path(state.best_model_checkpoint).name,
            "metrics": _final_metrics(state),
            "environment": environment(),
        }

    def _data(self) -> dict[str, Any]:
        """Numbers of images and classes, and how the test was kept apart if the source has no parts."""
        dataset = self.trainer.train_dataset
        share = dataset.holdout if isinstance(dataset, ImageClassificationDataset) else 0.0
        counts = {"num_images": len(dataset), "num_classes": len(dataset.class_names)}
        return counts | ({"holdout": share, "holdout_seed": 0} if share else {})

    def _selection(self, args: TrainingArguments) -> dict[str, Any] | None:
        """The images on which the checkpoint was chosen; None where the last one was taken."""
        if not args.load_best_model_at_end:
            return None
        images = self.trainer.eval_dataset
        parts = images.values() if isinstance(images, Mapping) else [images]
        samples = [image_sample(part) for part in parts if isinstance(part, ImageClassificationDataset)]
        return {"metric": args.metric_for_best_model, "sample": sorted(set().union(*samples))}


def was_finished(trainer: Any, step: int) -> bool:
    """Whether a run's folder holds the results of the run whose last checkpoint lies there: all, and newer than it.

    Args:
        trainer: The trainer of the run.
        step: Its last step.
    """
    folder = Path(trainer.args.output_dir)
    checkpoint, summary = numbered_checkpoints(folder).get(step), folder / SUMMARY_NAME
    adapter = saved_adapter(trainer.image_model, folder)
    expected = [summary, folder / METRICS_NAME]
    expected += [folder / CURVE_NAME] if has_matplotlib() else []
    expected += [] if adapter is None else [adapter / WEIGHTS_NAME, adapter / CARD_NAME]
    if checkpoint is None or not all(path.is_file() for path in expected):
        return False
    return summary.stat().st_mtime >= (checkpoint / MANIFEST_NAME).stat().st_mtime


def _final_metrics(state: TrainerState) -> dict[str, float]:
    """The last value of every logged quantity.

    Args:
        state: State of the trainer.
    """
    last: dict[str, float] = {}
    for entry in state.log_history:
        last |= entry
    return last


def _plain(value: Any) -> Any:
    """An argument as a JSON value."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def describe_adapter(model: nn.Module, objective: Objective, dataset: RunImages) -> VLMConfig | None:
    """Write classes, template and preprocessing into the adapter's configuration, so that its folder is enough to
    predict.

    A configuration of PEFT's own gets no foreign fields: what is to be written beside it is returned.

    Args:
        model: `PeftModel`; other models are left alone.
        objective: Its class prompts, if it has any, name classes and template.
        dataset: Its transform holds mean, standard deviation and size.

    Returns:
        The configuration itself where it is of this package, else a record for `write_facts`; None without an adapter.
    """
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    if not isinstance(config, VLMConfig):
        config = VLMConfig(base_architecture=architecture_of(unwrap(model).config.to_dict()))
    record_data(config, objective.prompts, dataset)
    return config


def publish_run(folder: Path, args: VLMTrainingArguments, repo_id: str, **options: Any) -> Published:
    """Publish a finished run with the settings of its arguments.

    Args:
        folder: The adapter.
        args: Licence, token, branch and visibility that `options` do not name.
        repo_id: Repository.
        **options: Passed to `publish`.
    """
    given = {key: value for key, value in options.items() if value is not None}
    own = {"license": args.hub_license, "token": args.hub_token, "revision": args.hub_revision}
    return publish(folder, repo_id, **{**own, "private": args.hub_private_repo, **given})


def push_checkpoint(args: VLMTrainingArguments, repo_id: str, checkpoint: Path, *, step: int) -> PushInProgress | None:
    """Upload a checkpoint in the background, where the arguments ask for it.

    Args:
        args: `hub_strategy` "checkpoint" keeps one, in the folder `last-checkpoint`; "all_checkpoints" keeps all.
        repo_id: Repository.
        checkpoint: Its folder.
        step: Number of the step, for the commit message.

    Returns:
        The upload under way; None if nothing is to be uploaded.
    """
    if args.hub_strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        return None
    last = args.hub_strategy == HubStrategy.CHECKPOINT
    job = HfApi(token=args.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=checkpoint,
        path_in_repo="last-checkpoint" if last else checkpoint.name,
        commit_message=f"Checkpoint of step {step}, not finished",
        ignore_patterns=[CARD_NAME],
        revision=args.hub_revision,
        run_as_future=True,
    )
    return PushInProgress([job])
