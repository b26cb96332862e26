"""Checkpoint directories: written atomically, checked when they are read, and compared with the run that resumes."""

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
from transformers import AutoModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from peft_vlm.adapters.config import VLMConfig, adapter_settings, check_adapter_file, write_facts
from peft_vlm.distributed import all_agree, from_main, is_main_process, wait_for_everyone
from peft_vlm.errors import AdapterError, CheckpointError, PeftVLMWarning
from peft_vlm.files import read_json, write_json
from peft_vlm.hub.publish import saved_adapter
from peft_vlm.objective import Objective
from peft_vlm.settings import RETIRED_SETTINGS
from peft_vlm.training.module import TrainingModule

MANIFEST_NAME = "manifest.json"
PREFIX = "checkpoint-"


@contextmanager
def atomic_folder(folder: Path, *, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which is renamed to its final place when all of it is on disk; an error leaves nothing.

    All processes enter and write their files; the main one lists them and renames the folder.

    Args:
        folder: Final place; what lies there is replaced.
        facts: Further entries of the manifest.

    Yields:
        The folder to write into, of the same name, in a folder of its own.

    Raises:
        CheckpointError: If a process could not write, for want of room or otherwise.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    partial = aside / folder.name
    failure: Exception | None = None
    try:
        if is_main_process():
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
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
    finally:
        if is_main_process():
            shutil.rmtree(aside, ignore_errors=True)


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


def _check_whole(folder: Path) -> None:
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


def save_weights(module: TrainingModule, folder: Path, facts: VLMConfig | None = None) -> None:
    """Save the active adapter, or the whole model when nothing is wrapped, as safetensors.

    Args:
        module: Model and objective.
        folder: Target; PEFT puts an adapter that is not named `default` into a subfolder of its name.
        facts: What an adapter of PEFT's own types has beside its configuration.
    """
    model = module.model
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=list(model.active_adapters))
        if facts is not None:
            write_facts(facts, model.active_peft_config, saved_adapter(model, folder) or folder)
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

    A run from the beginning has all of them ahead; one that continues from an early checkpoint has the later ones.

    Args:
        trainer: The trainer it belongs to.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After the first step, set aside what lies ahead."""
        if state.global_step != self.trainer.first_step + 1:
            return
        if is_main_process():
            _set_aside(Path(args.output_dir), after=self.trainer.first_step)
        wait_for_everyone()


def _set_aside(output_dir: Path, *, after: int) -> None:
    """Rename checkpoints; a warning says so. Those of a run before the earlier one are replaced.

    Args:
        output_dir: Folder of the run.
        after: Step after which they were written.
    """
    found = [folder for step, folder in sorted(numbered_checkpoints(output_dir).items()) if step > after]
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
    return json.loads(json.dumps(own | objective.config_dict(), default=str))


def warn_of_changes(checkpoint: Path, *, order: dict[str, Any], settings: dict[str, Any], has_optimizer: bool) -> None:
    """Say so where the resumed run is not the interrupted one.

    Args:
        checkpoint: What the run continues from.
        order: Of `order_of`, for this run.
        settings: Of `settings_of`, as they are before training fills in what it finds.
        has_optimizer: Whether the checkpoint holds an optimizer that this run can read.
    """
    manifest, problems = read_json(checkpoint / MANIFEST_NAME), []
    found = manifest.get("settings_found", {})  # what training had filled in: an objective may be used again
    for name, now, what in (
        ("order", order, "sees other batches than it would have"),
        ("settings", settings, "has other settings"),
    ):
        saved = {key: value for key, value in manifest.get(name, {}).items() if key not in RETIRED_SETTINGS}
        changed = sorted(key for key in saved if now.get(key) not in (saved[key], found.get(key, saved[key])))
        text = ", ".join(f"{key} was {saved[key]!r} and is {now.get(key)!r}" for key in changed)
        problems += [f"{what}: {text}"] if changed else []
    if not has_optimizer:
        problems.append(f"begins with a new optimizer and schedule: the checkpoint has no {OPTIMIZER_NAME}")
    if problems:
        message = f"The run goes on from {checkpoint.name}, but {'; and it '.join(problems)}."
        warnings.warn(message, PeftVLMWarning, stacklevel=3)


def checkpoint_to_resume(choice: str | bool, output_dir: Path) -> Path | None:
    """The checkpoint that a run continues from; None where it starts from the beginning.

    Args:
        choice: A folder; True for the newest whole checkpoint; `"auto"` for the same, or for the beginning where there
            is none. A damaged checkpoint is named in a warning and the one before it is used.
        output_dir: Folder of the run.

    Raises:
        CheckpointError: If the folder is damaged, or True finds no checkpoint.
    """
    if choice is not True and choice != "auto":
        _check_whole(Path(choice))
        return Path(choice)
    found = last_checkpoint(output_dir)
    if found is None and list(output_dir.glob(f"{EARLIER}{PREFIX}*")):
        message = f"The run starts again: {str(output_dir)!r} has checkpoints of an earlier run only."
        warnings.warn(message, PeftVLMWarning, stacklevel=3)
    if found is None and choice is True:
        raise CheckpointError(
            f"Expected a checkpoint in {str(output_dir)!r}, got none. `resume_from_checkpoint='auto'` starts from the "
            "beginning where there is none."
        )
    return found
