"""A Trainer whose checkpoints are whole or not there, hold what an exact resume needs, and are checked before use.

Overrides of Trainer internals about checkpoints live here; those about data, loss and evaluation in `trainer.py`.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from peft_vlm.adapters.config import VLMConfig, installed_version
from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.files import read_json
from peft_vlm.objective import Objective
from peft_vlm.training.advice import with_advice
from peft_vlm.training.checkpoint import load_objective_state, load_weights, save_objective_state, save_weights
from peft_vlm.training.checkpoint_folder import (
    MANIFEST_NAME,
    PREFIX,
    check_whole,
    last_checkpoint,
    moved_into,
    written_whole,
)
from peft_vlm.training.earlier_run import EARLIER
from peft_vlm.training.interrupt import Interrupt

STATE_NAME = "trainer_state.json"
#: Settings that decide which images a step sees, and in which order.
ORDER = (
    *("seed", "data_seed", "world_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "dataloader_drop_last",
)
#: Of a stream too: its workers divide the rows.
STREAM_ORDER = (*ORDER, "dataloader_num_workers")


class ResumableTrainer(Trainer):
    """Checkpoints of adapter, objective, optimizer, schedule, loss scaler, random states and trainer state.

    Args:
        **kwargs: Of `transformers.Trainer`.
    """

    objective: Objective

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.interrupt = Interrupt()
        self._begun_with = self._settings()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A folder; True for the newest whole checkpoint in `output_dir`; `"auto"` for the
                same, or for the beginning where there is none. A damaged checkpoint is named in a warning and the one
                before it is used.
            *args: Of `transformers.Trainer.train`.
            **kwargs: Of `transformers.Trainer.train`.
        """
        if resume_from_checkpoint is True or resume_from_checkpoint == "auto":
            found = last_checkpoint(Path(self.args.output_dir))
            if found is None and list(Path(self.args.output_dir).glob(f"{EARLIER}{PREFIX}*")):
                message = f"The run begins anew: {self.args.output_dir!r} has checkpoints of an earlier run only."
                warnings.warn(message, PeftVLMWarning, stacklevel=2)
            if found is not None or resume_from_checkpoint == "auto":
                resume_from_checkpoint = None if found is None else str(found)
        elif resume_from_checkpoint:
            check_whole(Path(resume_from_checkpoint))
        if isinstance(resume_from_checkpoint, str):
            self._compare(Path(resume_from_checkpoint))
            if self.is_deepspeed_enabled:  # the base class then leaves out `_load_from_checkpoint`
                load_objective_state(self.objective, Path(resume_from_checkpoint))
        with self.interrupt.watched(), with_advice(self.args, self.objective.config_dict()):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _order(self) -> dict[str, Any]:
        images: Any = self.train_dataset
        if isinstance(images, ImageStream):
            return {name: getattr(self.args, name) for name in STREAM_ORDER} | images.order_facts()
        return {name: getattr(self.args, name) for name in ORDER} | {"images": len(images)}

    def _settings(self) -> dict[str, Any]:
        """Those of method and objective, as they are before training fills in what it finds."""
        config = getattr(self.model.model, "active_peft_config", None)
        own = config.method_settings() if isinstance(config, VLMConfig) else {}
        return json.loads(json.dumps(own | self.objective.config_dict(), default=str))

    def _compare(self, checkpoint: Path) -> None:
        """Say so where the resumed run is not the interrupted one."""
        manifest, problems = read_json(checkpoint / MANIFEST_NAME), []
        found = manifest.get("settings_found", {})  # what training had filled in: an objective may be used again
        for name, now, what in (
            ("order", self._order(), "sees other batches than it would have"),
            ("settings", self._begun_with, "has other settings"),
        ):
            saved = manifest.get(name, {})
            changed = sorted(key for key in saved if now.get(key) not in (saved[key], found.get(key, saved[key])))
            text = ", ".join(f"{key} was {saved[key]!r} and is {now.get(key)!r}" for key in changed)
            problems += [f"{what}: {text}"] if changed else []
        if not (checkpoint / OPTIMIZER_NAME).is_file() and not self.is_deepspeed_enabled:
            problems.append(f"begins with a new optimizer and schedule: the checkpoint has no {OPTIMIZER_NAME}")
        if problems:
            message = f"The run goes on from {checkpoint.name}, but {'; and it '.join(problems)}."
            warnings.warn(message, PeftVLMWarning, stacklevel=3)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name and rename it when all of it is on disk."""
        self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX}{self.state.global_step}"
        best = run / f"{PREFIX}{self.state.best_global_step}"
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        facts = {"peft_vlm": installed_version(), "step": self.state.global_step}
        facts |= {"order": self._order(), "settings": self._begun_with, "settings_found": self._settings()}
        with written_whole(folder, facts=facts) as partial:
            self.save_model(str(partial), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            if self.args.should_save:
                self._note_callbacks()
                self.state.save_to_json(str(partial / STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            limit, best_checkpoint = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run), limit, best_checkpoint, use_mtime=True)

    def _note_callbacks(self) -> None:
        """Put the state of callbacks that have one into the trainer state, as the base class does."""
        exported: dict[str, list[Any]] = {}
        assert self.state.stateful_callbacks is not None, "the trainer fills it when training begins"
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        for name, states in exported.items():
            several = isinstance(self.state.stateful_callbacks.get(name), list)
            self.state.stateful_callbacks[name] = states if several else states[-1]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write adapter weights and objective state, file by file in one step each; no pickled arguments."""
        folder = Path(output_dir or self.args.output_dir)
        state = self.objective.state_dict()
        if not self.args.should_save:
            return
        with moved_into(folder) as partial:
            save_weights(self.model, partial)
            save_objective_state(state, partial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore adapter and objective, whatever the adapter's name."""
        load_weights(self.model, Path(resume_from_checkpoint))
        load_objective_state(self.objective, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best checkpoint's adapter under its own name; the base class would always load `default`."""
        load_weights(self.model, Path(self.state.best_model_checkpoint))
