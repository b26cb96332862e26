"""A damaged checkpoint is named, and the one before it is used; a full disk leaves nothing half-written."""

import errno
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_vlm.errors import CheckpointError, PeftVLMWarning
from peft_vlm.training import checkpoints
from peft_vlm.training.checkpoints import MANIFEST_NAME, damage, last_checkpoint, moved_into, read_manifest
from tests import forked
from tests.short_run import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with checkpoints 2, 4, ... 12; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    forked.run(folder / "log.txt", train, str(folder), "promptsrc", settings={"gpa_mean": 2.0, "gpa_std": 1.0})
    assert sorted(path.name for path in folder.glob("checkpoint-*"))[0] == "checkpoint-10"
    return folder


def test_a_checkpoint_lists_all_its_files(finished: Path) -> None:
    """A file that is not in the list could be cut off without notice."""
    folder = finished / "checkpoint-12"
    listed = json.loads((folder / MANIFEST_NAME).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed["files"]) == files - {MANIFEST_NAME}
    expected = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert expected | {"objective_state.safetensors"} <= files
    assert listed["step"] == 12
    assert not damage(folder)


FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
DAMAGES = [(kind, name) for kind in ("cut off", "changed", "missing") for name in FILES]


@pytest.mark.parametrize(("kind", "name"), [*DAMAGES, ("cut off", MANIFEST_NAME), ("missing", MANIFEST_NAME)])
def test_damage_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, finished: Path, kind: str, name: str
) -> None:
    """A half-loaded checkpoint trains on, and nothing tells its result from a good one."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-12" / name
    content = bytearray(path.read_bytes())
    if kind == "changed":
        content[len(content) // 2] ^= 16
    path.write_bytes(content[: len(content) // 2] if kind == "cut off" else content)
    if kind == "missing":
        path.unlink()
    with pytest.warns(PeftVLMWarning, match=rf"checkpoint-12: .*{name}.* goes on from checkpoint-10"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1}}}']
)
def test_a_manifest_that_is_still_json_is_named_too(tmp_path: Path, finished: Path, text: str) -> None:
    """One changed bit in a key would end the run that a resume should save."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-12" / MANIFEST_NAME).write_text(text)
    with pytest.warns(PeftVLMWarning, match=f"checkpoint-12: {MANIFEST_NAME} is cut off or damaged. The run"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


WRONG_TYPES = {
    "files": [None, [], {"../a": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {"bytes": 1, "sha256": ""}}],
    "step": ["4", 4.0, True, -1, None],
    "order": [[], "x", 3],
    "settings": [None],
    "settings_found": [[["a", 1]]],
    "identity": ["x"],
    "rates": [0.1],
    "changes": [{"a": 1}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values]
)
def test_wrong_types_in_a_manifest_are_one_line(tmp_path: Path, finished: Path, name: str, value: object) -> None:
    """A checkpoint may come from anybody; a traceback of ours says nothing to who was given it."""
    folder = shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=r"^Expected .* in '.*manifest.json', got .* The file is damaged[^\n]*$"):
        read_manifest(folder)
    assert damage(folder) == [f"{MANIFEST_NAME} is cut off or damaged"]


def test_a_checkpoint_put_together_from_two_is_named(tmp_path: Path, finished: Path) -> None:
    """Weights of one step with the counts of another pass every check of single files."""
    folder = shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-8")
    steps = "trainer_state.json says step {}, manifest.json says step {}"
    assert damage(folder) == [f"it is put together from several: {steps.format(4, 4)}, its name says step 8"]
    state = (finished / "checkpoint-8" / "trainer_state.json").read_bytes()
    (folder / "trainer_state.json").write_bytes(state)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"]["trainer_state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert steps.format(8, 4) in damage(folder)[0]


def test_a_new_run_sets_the_checkpoints_of_an_earlier_one_aside(tmp_path: Path, finished: Path) -> None:
    """When the new run dies, `auto` would go on from the earlier one's last step, and call its adapter the result."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    options = {"settings": {"gpa_mean": 2.0, "gpa_std": 1.0}}
    with pytest.warns(PeftVLMWarning, match="are kept as 'earlier-...': checkpoint-2, .*, checkpoint-12"):
        train(tmp_path, "promptsrc", max_steps=2, **options)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    aside = sorted(path.name for path in tmp_path.glob("earlier-*"))
    assert aside == sorted(f"earlier-checkpoint-{step}" for step in range(2, 13, 2))
    assert not damage(tmp_path / "earlier-checkpoint-12")
    train(tmp_path, "promptsrc", resume="auto", max_steps=4, save_total_limit=1, **options)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert sorted(path.name for path in tmp_path.glob("earlier-*")) == aside, "rotation leaves them"


def test_a_run_that_does_not_start_leaves_earlier_checkpoints(tmp_path: Path, finished: Path) -> None:
    """A refusal must not cost what there is to go on from."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)

    def fail(model, objective, dataset) -> None:
        objective.epoch_start = lambda *arguments: 1 / 0

    options = {"settings": {"gpa_mean": 2.0, "gpa_std": 1.0}}
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, "promptsrc", change=fail, **options)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert not list(tmp_path.glob("earlier-*"))


def test_a_run_that_goes_on_from_an_early_checkpoint_sets_later_ones_aside(tmp_path: Path, finished: Path) -> None:
    """They are of another branch: an interrupted run would be continued from the wrong one."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    options = {"settings": {"gpa_mean": 2.0, "gpa_std": 1.0}, "save_strategy": "no"}
    with pytest.warns(PeftVLMWarning, match="'earlier-...': checkpoint-6, .*, checkpoint-12"):
        train(tmp_path, "promptsrc", resume=str(tmp_path / "checkpoint-4"), max_steps=5, **options)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.warns(PeftVLMWarning, match="starts again: .* has checkpoints of an earlier run only"):
        train(tmp_path, "promptsrc", resume="auto", max_steps=1, **options)


def test_a_run_goes_on_past_a_damaged_checkpoint_to_the_same_tensors(tmp_path: Path, finished: Path) -> None:
    """The damaged checkpoint is replaced when the run comes by again."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "final-0.safetensors").unlink()
    weights = tmp_path / "checkpoint-12" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    options = {"settings": {"gpa_mean": 2.0, "gpa_std": 1.0}, "resume": "auto"}
    printed = forked.run(tmp_path / "log.txt", train, str(tmp_path), "promptsrc", **options)
    assert "checkpoint-12: adapter_model.safetensors is cut off or damaged (1000 of" in printed
    resumed, straight = (load_file(folder / "final-0.safetensors") for folder in (tmp_path, finished))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    assert not damage(tmp_path / "checkpoint-12")


def test_damaged_checkpoints_alone_are_refused(tmp_path: Path, finished: Path) -> None:
    """Starting anew without a word would throw the run away."""
    shutil.copytree(finished / "checkpoint-12", tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="damaged ones only: checkpoint-12: optimizer.pt is missing"):
        last_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path: Path, finished: Path) -> None:
    """Another one than the user named must not be taken silently."""
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"scheduler.pt is cut off or damaged \(0 of"):
        train(tmp_path, "promptsrc", resume=str(tmp_path / "checkpoint-4"))


def test_a_resume_with_other_batches_says_so(tmp_path: Path, finished: Path) -> None:
    """Half of the images would come twice and the others not at all."""
    folder = shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    options = {"settings": {"gpa_mean": 2.0, "gpa_std": 1.0}, "save_strategy": "no"}
    with pytest.warns(PeftVLMWarning, match="per_device_train_batch_size was 4 and is 2"):
        train(tmp_path, "promptsrc", resume=str(folder), per_device_train_batch_size=2, max_steps=6, **options)


def train_without_checkpoints(folder: str, limit: int) -> None:
    """Train where no file can grow beyond a size, and only the end is saved."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train(folder, "skip_tuning", max_steps=2, save_strategy="no")


def test_a_final_adapter_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    """The last file of a long run deserves more than an I/O error."""
    log = tmp_path / "log.txt"
    assert forked.wait(forked.start(log, train_without_checkpoints, str(tmp_path), 20_000), log) == 1
    assert "Free some room, lower `save_total_limit`" in log.read_text()
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "adapter_model.safetensors").exists()


def train_with_small_files(folder: str, method: str, limit: int) -> None:
    """Train where no file can grow beyond a size, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train(folder, method, resume="auto")


def test_a_file_that_cannot_be_written_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    """Half a checkpoint would be taken for the newest one."""
    log = tmp_path / "log.txt"
    forked.run(log, train, str(tmp_path), "skip_tuning", max_steps=2, num_train_epochs=2)
    before = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    size = (tmp_path / "checkpoint-2" / "adapter_model.safetensors").stat().st_size
    log.unlink()
    process = forked.start(log, train_with_small_files, str(tmp_path), "skip_tuning", size // 2)
    assert forked.wait(process, log) == 1
    printed = log.read_text()
    assert "File too large" in printed
    assert "nothing half-written is left, and earlier checkpoints are untouched" in printed
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == before
    assert not damage(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MB in memory."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {folder} 2>/dev/null"):
        pytest.skip("this system does not let tests mount a tmpfs")
    yield folder
    os.system(f"umount {folder}")


def test_a_final_adapter_is_moved_when_all_of_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights beside the old configuration are no adapter; leftovers of a killed run are none either."""
    (tmp_path / ".partial").mkdir()
    for name in ("a", "b", ".partial/leftover"):
        (tmp_path / name).write_text("old")
    synced = []

    def full(path: Path) -> int:
        synced.append(path.name)
        if len(synced) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return 0

    def write(*names: str) -> None:
        with moved_into(tmp_path) as partial:
            for name in names:
                (partial / name).write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_synced", full)
        with pytest.raises(CheckpointError, match="Free some room"):
            write("a", "b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}
    write("a")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "old"}


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoints(tmp_path: Path, small_disk: Path) -> None:
    """The checkpoint that does not fit must not cost the ones before it."""
    log = tmp_path / "log.txt"
    assert forked.wait(forked.start(log, train, str(small_disk), "skip_tuning", resume="auto"), log) == 1
    printed = log.read_text()
    assert "Free some room, lower `save_total_limit`, or save less often" in printed
    assert "got CheckpointError" not in printed, "advice within advice"
    whole = sorted(path.name for path in small_disk.glob("checkpoint-*"))
    assert len(whole) >= 1
    assert not any(damage(small_disk / name) for name in whole)
    assert not list(small_disk.glob(".*"))
