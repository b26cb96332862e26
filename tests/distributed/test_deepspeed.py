"""DeepSpeed's ZeRO 2 in two processes trains what one process trains; what it cannot train is refused.

DeepSpeed is no dependency of the tests: `pip install deepspeed` with `DS_BUILD_OPS=0`, and a C++ compiler, to run all
of this on a CPU.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm.errors import CheckpointError
from peft_vlm.training import schedule
from peft_vlm.training.deepspeed import check_deepspeed, check_optimizer, start_deepspeed
from peft_vlm.training.module import TrainingModule
from tests import forked
from tests.cases import CASES, base_model
from tests.distributed.test_two_processes import ALL, history
from tests.short_run import QUESTION_RUNS, parts, train
from tests.source_tree import ROOT

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

#: Methods whose update needs more than ZeRO gives.
REFUSED = ("cpl", "tvp", "tvp_questions")
NAMES = [name for name, (method, _) in ALL.items() if method not in REFUSED]
#: Methods with the most to remember: Gaussian aggregation, BatchNorm of a projector, drawn classes.
RESUMED = ("coop", "promptsrc", "promptkd", "skip_tuning")


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed configuration."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(auto, "auto") | {"zero_optimization": {"stage": stage}} | settings


def train_all(folder: str, batch_size: int, **arguments: Any) -> None:
    """Train every method that ZeRO can train, then evaluate; each with another number of images."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for number, name in enumerate(NAMES):
        method, settings = ALL[name]
        options = {"settings": None if method in QUESTION_RUNS else settings, "data": {"count": (17, 23)[number % 2]}}
        place = Path(folder) / name
        trainer = train(
            place, method, save_strategy="no", per_device_train_batch_size=batch_size, **options, **arguments
        )
        if method not in QUESTION_RUNS:
            trainer.eval_dataset = trainer.train_dataset.select(range(13))
            (place / f"evaluation-{trainer.args.process_index}.json").write_text(json.dumps(trainer.evaluate()))


def train_and_resume(folder: str) -> None:
    """Train with checkpoints, and go on from one of them in another folder."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for method in RESUMED:
        place, options = Path(folder) / method, {"deepspeed": zero(2), "settings": ALL[method][1]}
        train(place, method, **options)
        train(place.with_name(f"{method}-resumed"), method, resume=str(place / "checkpoint-2"), **options)


def train_otherwise(folder: str, batch_size: int, **arguments: Any) -> None:
    """Accumulated batches, clipped gradients, Adam, and bfloat16."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    options = {"save_strategy": "no", "data": {"count": 17}} | arguments
    size = {"per_device_train_batch_size": batch_size}
    halves = {"per_device_train_batch_size": batch_size // 2, "gradient_accumulation_steps": 2}
    train(Path(folder) / "accumulated", "coop", **halves, **options)
    train(Path(folder) / "clipped", "promptsrc", max_grad_norm=0.5, **size, **options)
    train(Path(folder) / "adam", "maple", optim="adamw_torch", **size, **options)
    train(Path(folder) / "bfloat16", "promptsrc", bf16=True, **size, **options)


def stop_at_a_broken_step(folder: str) -> None:
    """A loss whose gradient is not a number."""
    os.environ["DS_ACCELERATOR"] = "cpu"

    def break_gradients(model: Any, objective: Any, dataset: Any) -> None:
        (prompt,) = (p for p in model.parameters() if p.requires_grad)
        prompt.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(FloatingPointError, match="a finite gradient, got another at step 0"):
        train(folder, "coop", change=break_gradients, deepspeed=zero(2))
    assert not list(Path(folder).glob("checkpoint-*"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs in one process with batches of 8, and under DeepSpeed in two with batches of 4."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    forked.run(one / "log.txt", train_all, str(one), 8)
    forked.run_group(two, train_all, str(two), 4, deepspeed=zero(2))
    return one, two


@needs_deepspeed
def test_zero_2_trains_what_one_process_trains(folders: tuple[Path, Path]) -> None:
    """An optimizer that sees parts of tensors, or a gradient that is averaged twice, trains another adapter."""
    one, two = folders
    assert len(NAMES) >= 15
    for name in NAMES:
        expected = load_file(one / name / "final-0.safetensors")
        first, second = (load_file(two / name / f"final-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        # the same float32 sums in another order, over 6 steps
        assert_close(first, expected, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
        for entry, other in zip(history(one / name), history(two / name), strict=True):
            assert other == pytest.approx(entry, rel=2e-3, abs=2e-5), name
        if ALL[name][0] not in QUESTION_RUNS:
            scores = [json.loads((folder / name / "evaluation-0.json").read_text()) for folder in folders]
            assert scores[1]["eval_accuracy"] == scores[0]["eval_accuracy"], name
            assert scores[1]["eval_loss"] == pytest.approx(scores[0]["eval_loss"], rel=1e-4), name


@needs_deepspeed
def test_a_checkpoint_of_zero_2_holds_trained_tensors_and_resumes_exactly(tmp_path: Path) -> None:
    """DeepSpeed writes the frozen base model into each checkpoint unless it is told not to."""
    forked.run_group(tmp_path, train_and_resume, str(tmp_path))
    frozen = sum(parameter.nbytes for parameter in base_model().parameters())
    for method in RESUMED:
        checkpoint = tmp_path / method / "checkpoint-2"
        states = (checkpoint / "global_step2" / "mp_rank_00_model_states.pt").stat().st_size
        trained = (tmp_path / method / "final-0.safetensors").stat().st_size
        assert states < trained + frozen / 4, method
        listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert sum("optim_states" in name for name in listed) == 2
        for rank in (0, 1):
            whole, resumed = (
                load_file(tmp_path / n / f"final-{rank}.safetensors") for n in (method, f"{method}-resumed")
            )
            assert all(torch.equal(whole[key], resumed[key]) for key in whole), method


@needs_deepspeed
def test_accumulation_clipping_adam_and_bfloat16_are_those_of_ddp(tmp_path: Path) -> None:
    """DeepSpeed has settings of its own for each of them, and casts prompts to bfloat16 by itself."""
    runs = {"ddp": {}, "stage 1": {"deepspeed": zero(1)}, "stage 2": {"deepspeed": zero(2)}}
    for name, arguments in runs.items():
        (tmp_path / name).mkdir()
        forked.run_group(tmp_path / name, train_otherwise, str(tmp_path / name), 4, **arguments)
    for run in ("accumulated", "clipped", "adam", "bfloat16"):
        ddp, *stages = (load_file(tmp_path / name / run / "final-0.safetensors") for name in runs)
        for tensors in stages:
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
            assert_close(tensors, ddp, rtol=1e-4, atol=2e-5, msg=lambda text, run=run: f"{run}: {text}")


@needs_deepspeed
def test_a_gradient_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path: Path) -> None:
    """DeepSpeed has made the update when it is looked at: the checkpoint would hold NaN."""
    forked.run_group(tmp_path, stop_at_a_broken_step, str(tmp_path / "run"))


def refuse_all(folder: str) -> None:
    """Methods that ZeRO cannot train, and stage 3, as a user meets them."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for method in REFUSED:
        with pytest.raises(ValueError, match=r"Use DDP \(examples/accelerate/ddp\.yaml\)"):
            train(Path(folder) / method, method, deepspeed=zero(2))
    with pytest.raises(ValueError, match=r"stage 1 or 2 of DeepSpeed's ZeRO, got 3"):
        train(Path(folder) / "coop", "coop", deepspeed=zero(3))
    assert not list(Path(folder).glob("*/checkpoint-*"))
    checkpoint = Path(folder).parent / "ddp" / "checkpoint-2"
    with pytest.raises(CheckpointError, match="got one that was written without DeepSpeed"):
        train(Path(folder) / "coop", "coop", resume=str(checkpoint), deepspeed=zero(2))


@needs_deepspeed
def test_a_run_that_zero_cannot_make_stops_before_its_first_step(tmp_path: Path) -> None:
    """TVP's step by a part of its gradient is another step: the losses part by 40 %."""
    (tmp_path / "zero").mkdir()
    forked.run(tmp_path / "log.txt", train, str(tmp_path / "ddp"), "coop")
    forked.run_group(tmp_path / "zero", refuse_all, str(tmp_path / "zero"))


@needs_deepspeed
def test_the_launchers_file_starts_zero_2(tmp_path: Path) -> None:
    """A key that is no longer known stops only the training; its bfloat16 must leave the saved prompts in float32."""
    launcher = ["accelerate.commands.launch", "--config_file", "examples/accelerate/deepspeed_zero2.yaml"]
    words = ["--num_processes", "2", "-m", "tests.short_run", str(tmp_path), "--method", "coop"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", *launcher, *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Training in 2 processes on cpu: 8 images per step" in result.stderr
    assert list(tmp_path.glob("checkpoint-*/global_step*"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "final-1.safetensors").values()} == {torch.float32}


def arguments(
    stage: int = 2, *, fp16: bool = False, fsdp: bool = False, non_finite: str = "error", **config: Any
) -> Any:
    """What the check reads of training arguments."""
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return SimpleNamespace(deepspeed_plugin=plugin, fp16=fp16, non_finite=non_finite, has_sharded_layers=fsdp)


def test_settings_that_deepspeed_would_drop_are_refused() -> None:
    """Its own optimizer replaces the method's parameter groups, and a step is over before it can be skipped."""
    cases = {
        "got 0: that is DDP": arguments(0),
        "got 3: it divides frozen weights": arguments(3),
        "no 'optimizer' in the DeepSpeed configuration": arguments(optimizer={"type": "Adam"}),
        "no 'scheduler' in the DeepSpeed configuration": arguments(scheduler={"type": "WarmupLR"}),
        "`offload_optimizer` to 'cpu'": arguments(zero_optimization={"offload_optimizer": {"device": "cpu"}}),
        "no `fp16` with DeepSpeed": arguments(fp16=True),
        "got both": arguments(fsdp=True),
        "got 'skip'": arguments(non_finite="skip"),
    }
    for message, args in cases.items():
        with pytest.raises(ValueError, match=message):
            check_deepspeed(args)
    check_deepspeed(arguments(1, zero_optimization={"offload_optimizer": {"device": "none"}}))
    with pytest.raises(ValueError, match=r"got \['SGD'\], which would be dropped"):
        start_deepspeed(SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0), lr_scheduler=None))


@pytest.mark.parametrize("method", [case.method for case in CASES])
def test_only_optimizers_that_divide_are_taken(method: str) -> None:
    """ZeRO hands an optimizer pieces of flattened tensors."""
    model, objective, images = parts(method)
    objective.adapt_to(model, images)
    module = TrainingModule(model, objective)
    args = schedule.VLMTrainingArguments(output_dir="unused", use_cpu=True)
    optimizer = schedule.build_optimizer(module, args=args)
    if method not in REFUSED:
        check_optimizer(optimizer, module)
        return
    with pytest.raises(
        ValueError, match="NormalizedGradient" if method == "tvp" else "of the objective, whose gradients"
    ):
        check_optimizer(optimizer, module)
