"""Checkpoint directories: written atomically, checked when they are read, and compared with the run that resumes."""

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.adapters.config import VLMConfig, check_adapter_file, write_facts
from peft_vlm.distributed import all_agree, from_main, is_main_process, wait_for_everyone
from peft_vlm.errors import AdapterError, CheckpointError, PeftVLMWarning, shown
from peft_vlm.files import read_json, write_json
from peft_vlm.hub.publish import saved_adapter
from peft_vlm.objective import Objective
from peft_vlm.training.module import TrainingModule

MANIFEST_NAME = "manifest.json"
STATE_NAME = "trainer_state.json"
PREFIX = "checkpoint-"
PARTIAL_NAME = ".partial"


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


#: Entries of a manifest that hold names and values; checkpoints of earlier versions lack some.
_FACTS = ("order", "settings", "settings_found", "identity", "rates", "precision")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the list of a checkpoint's files and the facts about its run, which may come from anybody.

    Args:
        folder: Checkpoint.

    Returns:
        `files` by their path in the folder, each with `bytes` and `sha256`; `step`, if it is known; and further facts.

    Raises:
        CheckpointError: If it is missing, no JSON, or of other types.
    """
    try:
        manifest = read_json(folder / MANIFEST_NAME)
    except AdapterError as error:
        raise CheckpointError(str(error)) from error

    def refuse(where: str, expected: str, value: Any) -> None:
        raise CheckpointError(
            f"Expected {expected} as {where} in {str(folder / MANIFEST_NAME)!r}, got {shown(value)}. The file is "
            "damaged: resume from another checkpoint."
        )

    if not isinstance(manifest, dict):
        refuse("the content", "names and values", manifest)
    if not isinstance(manifest.get("files"), dict):
        refuse("`files`", "names and values", manifest.get("files"))
    for name, entry in manifest["files"].items():
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
            refuse("the name of a file", "a path inside the checkpoint", name)
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            refuse(f"the entry of {shown(name)}", "`bytes` and `sha256`", entry)
    if "step" in manifest and (type(manifest["step"]) is not int or manifest["step"] < 0):
        refuse("`step`", "a number of steps", manifest["step"])
    if not isinstance(manifest.get("changes", []), list):
        refuse("`changes`", "a list", manifest["changes"])
    for name in _FACTS:
        if not isinstance(manifest.get(name, {}), dict):
            refuse(f"`{name}`", "names and values", manifest[name])
    return manifest


def step_of(checkpoint: Path) -> int:
    """Return the steps that a checkpoint's run had made.

    Args:
        checkpoint: Checkpoint.

    Raises:
        CheckpointError: If its trainer state does not say.
    """
    try:
        state = read_json(checkpoint / STATE_NAME)
    except AdapterError as error:
        raise CheckpointError(str(error)) from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise CheckpointError(
            f"Expected a number of steps as `global_step` in {str(checkpoint / STATE_NAME)!r}, got {shown(step)}. The "
            "file is damaged: resume from another checkpoint."
        )
    return step


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; empty when it is whole.

    Args:
        folder: Checkpoint.
    """
    if not (folder / MANIFEST_NAME).exists():
        return [f"no {MANIFEST_NAME}, which is written last"]
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # JSON may be damaged and still be JSON
        return [f"{MANIFEST_NAME} is cut off or damaged"]
    found = []
    for name, entry in manifest["files"].items():
        path, expected = folder / name, entry["bytes"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found.append(f"{name} is missing")
        elif size != expected:
            found.append(f"{name} is cut off or damaged ({size} of {expected} bytes)")
        elif _hash(path) != entry["sha256"]:
            found.append(f"{name} is cut off or damaged (other content than was written)")
    return found or _other_steps(folder, manifest)


def _other_steps(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Say so where trainer state, manifest and name of a checkpoint are of different steps."""
    try:
        steps = {STATE_NAME: step_of(folder)}
    except CheckpointError:
        return [f"{STATE_NAME} has no number of steps"]
    if "step" in manifest:
        steps[MANIFEST_NAME] = manifest["step"]
    named = folder.name.removeprefix(PREFIX)
    if folder.name.startswith(PREFIX) and named.isdigit():
        steps["its name"] = int(named)
    if len(set(steps.values())) == 1:
        return []
    return [f"it is put together from several: {', '.join(f'{what} says step {n}' for what, n in steps.items())}"]


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


def check_whole(folder: Path, *, advice: str = "") -> None:
    """Refuse a checkpoint that is not whole.

    Args:
        folder: Checkpoint.
        advice: What to do about it; empty: take another one.

    Raises:
        CheckpointError: Naming what is wrong.
    """
    found = from_main(damage(folder) if is_main_process() else None)
    if found:
        other = "Resume from an earlier one, or let `resume_from_checkpoint='auto'` choose the newest whole one."
        raise CheckpointError(
            f"Expected a whole checkpoint, got {str(folder)!r}: {', '.join(found)}. {advice or other}"
        )


@contextmanager
def moved_into(target: Path, *, last: str | None = None) -> Iterator[Path]:
    """A folder to write into, whose files are then moved into another, each in one step; an error leaves nothing of
    them. For one process.

    Args:
        target: Where they go; files of the same name are replaced.
        last: Name of the file that is moved when all others are in place, and says that they are.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: If there was no room, or writing failed otherwise.
    """
    partial = target / PARTIAL_NAME
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        files.sort(key=lambda path: path.name == last)
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


def checkpoint_to_resume(choice: str | bool, output_dir: Path) -> Path | None:
    """The checkpoint that a run continues from; None where it starts from the beginning.

    Args:
        choice: A folder; True for the newest whole checkpoint; `"auto"` for the same, or for the beginning where there
            is none. A damaged checkpoint is named in a warning and the one before it is used.
        output_dir: Folder of the run.

    Raises:
        CheckpointError: If the folder is damaged, or True finds no checkpoint.
    """
    choice = {"True": True, "true": True}.get(str(choice), choice)  # as a flag says it
    if choice is not True and choice != "auto":
        check_whole(Path(choice))
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
