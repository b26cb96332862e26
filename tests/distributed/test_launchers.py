"""The commands of docs/scaling.md start as many processes as they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_vlm import VLMTrainingArguments
from tests import forked
from tests.source_tree import ROOT

FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
SCRIPT = ["-m", "tests.short_run"]


def test_every_launcher_file_says_what_it_starts() -> None:
    """A key that accelerate does not know is refused only when a training is started."""
    from accelerate.commands.config.config_args import load_config_from_file

    assert len(FILES) == 5
    for path in FILES:
        config = load_config_from_file(str(path))
        assert f"\nnum_processes: {config.num_processes}\n" in path.read_text()
        assert not config.use_cpu, path.name  # accelerate would start one process


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_starts_two_processes(tmp_path: Path, launcher: str) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one and says nothing."""
    commands = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SCRIPT],
        "accelerate": ["accelerate.commands.launch", "--config_file", str(FILES[0]), *SCRIPT],
    }
    assert FILES[0].name == "cpu_two_processes.yaml"
    command = [sys.executable, "-m", *commands[launcher], str(tmp_path), "--method", "coop"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Training in 2 processes on cpu: 8 images per step" in result.stderr
    assert {path.name for path in tmp_path.glob("final-*")} == {"final-0.safetensors", "final-1.safetensors"}


@pytest.mark.slow
def test_the_command_says_once_what_it_has_written(tmp_path: Path) -> None:
    """Each process once printed the closing lines, the others before the main one had evaluated."""
    words = ["--method", "skip_tuning", "--model", "examples/assets/clip_student", "--max_steps", "1", "--shots", "1"]
    words += ["--dataset", "examples/assets/emoji", "--template", "{} emoji", "--use_cpu", "--report_to", "none"]
    words += ["--config", "start_layer=3", "text_start_layer=2", "--objective", "batch_composition=random"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peft_vlm.cli", "train"]
    command = [sys.executable, "-m", *launcher, *words, "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Written to") == 1
    assert result.stdout.splitlines()[-1].startswith("Written to")
    assert result.stdout.count("zero_shot_accuracy") == 1
    assert (tmp_path / "run" / "zero_shot.json").is_file()


@pytest.mark.slow
def test_a_papers_grid_divides_the_steps_of_each_run(tmp_path: Path) -> None:
    """Two processes with the recipe's batch each would train another table, or each its own."""
    words = ["reproduce", "coop", "--stand-in", "--protocol", "base_to_new", "--datasets", "emoji", "--seeds", "1"]
    words += ["--max_steps", "2", "--use_cpu", "--output_dir"]
    launchers = {"one": ["peft_vlm.cli"], "two": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    launchers["two"] += ["-m", "peft_vlm.cli"]
    tables = {}
    for name, launcher in launchers.items():
        command = [sys.executable, "-m", *launcher, *words, str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Written to") == 1
        tables[name] = json.loads((tmp_path / name / "table.json").read_text())
        assert "Training in" not in result.stderr or "32 images per step" in result.stderr
    one, two = ([row["ours"]["mean"] for row in table["rows"] if row["ours"]] for table in tables.values())
    assert len(one) == 3
    assert two == pytest.approx(one, abs=1.0), "an image or two may fall on the other side by rounding"


def arguments_without_a_device(folder: str) -> None:
    """Settings of a run in two processes without `use_cpu`, with and without a backend."""
    for backend in (None, "gloo"):
        with pytest.raises(ValueError, match=r"Expected 2 processes to train together.*use_cpu=True"):
            VLMTrainingArguments(output_dir=folder, ddp_backend=backend)


def test_processes_that_would_train_apart_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU and without `use_cpu`, accelerate connects nothing: each process trained its own adapter."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    forked.run_group(tmp_path, arguments_without_a_device, str(tmp_path / "run"))


def test_a_backend_without_a_launcher_is_refused(tmp_path: Path) -> None:
    """Accelerate stopped inside torch with the words that no process group was initialised."""
    with pytest.raises(ValueError, match="Expected `ddp_backend` only where a launcher starts processes"):
        VLMTrainingArguments(output_dir=str(tmp_path), ddp_backend="gloo")
