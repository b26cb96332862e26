"""Checkpoint folders that are whole or not there: written aside, listed with their hashes, synced, then renamed."""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from peft_vlm.adapters.config import VLMConfig, check_adapter_file, installed_version
from peft_vlm.data.streaming import ImageStream
from peft_vlm.distributed import all_agree, from_main, is_main_process, wait_for_everyone
from peft_vlm.errors import AdapterError, CheckpointError, PeftVLMWarning
from peft_vlm.files import read_json, write_json
from peft_vlm.objective import Objective
from peft_vlm.settings import RETIRED_SETTINGS
from peft_vlm.training.callbacks import Interrupt, with_advice
from peft_vlm.training.module import TrainingModule

MANIFEST_NAME = "manifest.json"
PREFIX = "checkpoint-"


@contextmanager
def written_whole(folder: Path, *, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which takes its final name when all of it is on disk; an error leaves nothing of it.

    All processes enter and write their files; the main one lists them and renames the folder.

    Args:
        folder: Final place; what lies there is replaced.
        facts: Further entries of the manifest.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: If a process could not write, for want of room or otherwise.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    failure: Exception | None = None
    try:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        wait_for_everyone()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
        except CheckpointError as error:  # of the adapter's files, which has its own advice
            failure = error.__cause__ if isinstance(error.__cause__, Exception) else error
        except Exception as error:  # of the system, torch and safetensors, each in its own way
            failure = error
        _same_on_all(failure, folder)
        try:
            if is_main_process():
                _finish(partial, folder, facts)
        except OSError as error:
            failure = error
        _same_on_all(failure, folder)
    except BaseException:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _same_on_all(failure: Exception | None, folder: Path) -> None:
    """Fail on every process when it failed on one, so that none waits for the others."""
    if all_agree(failure is None):
        return
    raise CheckpointError(_not_written(failure, folder)) from failure


def _not_written(failure: Exception | None, folder: Path) -> str:
    room = shutil.disk_usage(_existing(folder.parent)).free / 2**20
    reason = "another process failed" if failure is None else f"{type(failure).__name__}: {failure}"
    hint = (
        f"There are {room:.1f} MB free. Free some room, lower `save_total_limit`, or save less often"
        if failure is None or _is_full(failure) or room < 1
        else "Look at the reason"
    )
    return (
        f"Expected to write {str(folder)!r}, got {reason}. {hint}, and go on with `resume_from_checkpoint='auto'`: "
        "nothing half-written is left, and earlier checkpoints are untouched."
    )


def _is_full(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def _finish(partial: Path, folder: Path, facts: dict[str, Any]) -> None:
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    listed = {path.relative_to(partial).as_posix(): {"bytes": _synced(path), "sha256": _hash(path)} for path in files}
    write_json(partial / MANIFEST_NAME, {**facts, "files": listed})
    _synced(partial / MANIFEST_NAME)
    for path in {partial, *(path.parent for path in files)}:
        _sync_folder(path)
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(folder)
    _sync_folder(folder.parent)


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; empty when it is whole.

    Args:
        folder: Checkpoint.
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        listed = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return [f"no {MANIFEST_NAME}, which is written last"]
    except (ValueError, KeyError, TypeError, AttributeError):  # JSON may be damaged and still be JSON
        return [f"{MANIFEST_NAME} is cut off or damaged"]
    found = []
    for name, expected, digest in listed:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found.append(f"{name} is missing")
        elif size != expected:
            found.append(f"{name} is cut off or damaged ({size} of {expected} bytes)")
        elif _hash(path) != digest:
            found.append(f"{name} is cut off or damaged (other content than was written)")
    return found


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none at all; damaged ones are named in a warning and passed by.

    The main process looks, and all processes get its answer.

    Args:
        output_dir: Folder of the run.

    Raises:
        CheckpointError: If there are checkpoints, but no whole one.
    """
    answer = from_main(_look(output_dir) if is_main_process() else None)
    if isinstance(answer, str):
        raise CheckpointError(answer)
    return answer


def _look(output_dir: Path) -> Path | str | None:
    broken: list[str] = []
    for _, folder in sorted(numbered_checkpoints(output_dir).items(), reverse=True):
        found = damage(folder)
        if not found:
            if broken:
                message = (
                    f"Damaged checkpoints are passed by: {'; '.join(broken)}. The run goes on from {folder.name}."
                )
                warnings.warn(message, PeftVLMWarning, stacklevel=2)
            return folder
        broken.append(f"{folder.name}: {', '.join(found)}")
    if broken:
        return (
            f"Expected a whole checkpoint in {str(output_dir)!r}, got damaged ones only: {'; '.join(broken)}. Start "
            "anew in another folder."
        )
    return None


def numbered_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Checkpoints by their step, whole or not.

    Args:
        output_dir: Folder of the run.
    """
    return {
        int(path.name.removeprefix(PREFIX)): path
        for path in output_dir.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    }


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint that is not whole.

    Args:
        folder: Checkpoint.

    Raises:
        CheckpointError: Naming what is wrong.
    """
    found = from_main(damage(folder) if is_main_process() else None)
    if found:
        raise CheckpointError(
            f"Expected a whole checkpoint, got {str(folder)!r}: {', '.join(found)}. Resume from an earlier one, or "
            "let `resume_from_checkpoint='auto'` choose the newest whole one."
        )


@contextmanager
def moved_into(target: Path) -> Iterator[Path]:
    """A folder to write into, whose files are then moved into another, each in one step; an error leaves nothing of
    them. For one process.

    Args:
        target: Where they go; files of the same name are replaced.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: If there was no room, or writing failed otherwise.
    """
    partial = target / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        for path in files:  # all of them, before the first one replaces another
            _synced(path)
        for path in files:
            place = target / path.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    except Exception as error:  # of the system, torch and safetensors, each in its own way
        raise CheckpointError(_not_written(error, target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced(path: Path) -> int:
    """Size of a file, after it has reached the disk."""
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


OBJECTIVE_STATE_NAME = "objective_state.safetensors"


def save_weights(module: TrainingModule, folder: Path) -> None:
    """Save the active adapter, or the whole model when nothing is wrapped, as safetensors.

    Args:
        module: Model and objective.
        folder: Target; PEFT puts an adapter that is not named `default` into a subfolder of its name.
    """
    model = module.model
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=list(model.active_adapters))
    else:
        model.save_pretrained(folder)


def load_weights(module: TrainingModule, folder: Path) -> None:
    """Load what `save_weights` wrote into the model, under the name of the active adapter.

    Args:
        module: Model and objective.
        folder: Checkpoint folder.

    Raises:
        AdapterError: If the folder holds no such adapter, or a damaged one.
    """
    model = module.model
    if not isinstance(model, PeftModel):
        state = AutoModel.from_pretrained(folder, local_files_only=True).state_dict()
        model.load_state_dict(state)
        return
    (name,) = model.active_adapters
    folder = folder if name == "default" else folder / name
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"Expected the adapter {name!r} in {str(folder)!r}, got no adapter_model.safetensors there. The "
            f"checkpoint is "
            "incomplete or of a run with another adapter name."
        )
    check_adapter_file(folder)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)


def save_objective_state(state: dict[str, Tensor], folder: Path) -> None:
    """Save what the objective needs for an exact resume.

    Args:
        state: Mapping of `Objective.state_dict`.
        folder: Checkpoint folder.
    """
    if state:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / OBJECTIVE_STATE_NAME)


def load_objective_state(objective: Objective, folder: Path) -> None:
    """Restore the objective from a checkpoint.

    Args:
        objective: The run's objective.
        folder: Checkpoint folder.

    Raises:
        AdapterError: If the objective has state and the file is missing.
    """
    path = folder / OBJECTIVE_STATE_NAME
    if not path.is_file():
        if objective.state_dict():
            raise AdapterError(
                f"Expected {OBJECTIVE_STATE_NAME!r} in {str(folder)!r}, got none. The checkpoint is "
                f"incomplete or of another "
                "objective; an exact resume is not possible from it."
            )
        return
    objective.load_state_dict(load_file(path))


EARLIER = "earlier-"
"""In front of the name of a checkpoint that is set aside; transformers' rotation does not see such folders."""


class EarlierRun(TrainerCallback):
    """Renames checkpoints ahead of a run when it has made its first step, not before: a run that is refused or fails
    at its start changes nothing.

    A run that begins anew has all of them ahead; one that goes on from an early checkpoint has the later ones.
    """

    def __init__(self) -> None:
        self._start = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remember where the run begins."""
        self._start = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After the first step, set aside what lies ahead."""
        if state.global_step != self._start + 1:
            return
        if is_main_process():
            set_aside(Path(args.output_dir), behind=self._start)
        wait_for_everyone()


def set_aside(output_dir: Path, *, behind: int) -> None:
    """Rename checkpoints; a warning says so. Those of a run before the earlier one are replaced.

    Args:
        output_dir: Folder of the run.
        behind: Step behind which they lie.
    """
    found = [folder for step, folder in sorted(numbered_checkpoints(output_dir).items()) if step > behind]
    if not found:
        return
    names = ", ".join(folder.name for folder in found)
    try:
        for folder in found:
            aside = folder.with_name(EARLIER + folder.name)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    except OSError as error:
        message = f"Checkpoints of an earlier run could not be set aside and may be taken for this one's: {error}."
    else:
        message = (
            f"Checkpoints of an earlier run in {str(output_dir)!r} are kept as '{EARLIER}...': {names}. To go on with "
            "that run, give one of them as `resume_from_checkpoint`."
        )
    warnings.warn(message, PeftVLMWarning, stacklevel=2)


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
            saved = {key: value for key, value in manifest.get(name, {}).items() if key not in RETIRED_SETTINGS}
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
