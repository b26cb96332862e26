"""Short runs of every method in bfloat16, and with recomputed activations, against float32."""

import json
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.short_run import RUNS, train

#: PromptKD's loss weight of 10 and BatchNorm over four images make the tiny student chaotic at higher rates.
RATES = {method: 1e-5 if method == "promptkd" else 1e-3 for method in RUNS}
VARIANTS = {"float32": {}, "bf16": {"bf16": True}, "recomputed": {"gradient_checkpointing": True}}


def train_all(folder: str) -> None:
    """Every method in every variant, one epoch."""
    for method in RUNS:
        for variant, options in VARIANTS.items():
            place = Path(folder) / variant / method
            train(
                place,
                method,
                save_strategy="no",
                num_train_epochs=1,
                learning_rate=RATES[method],
                warmup_epochs=0,
                **options,
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, in one process of their own."""
    folder = tmp_path_factory.mktemp("precision")
    forked.run(folder / "log.txt", train_all, str(folder))
    return folder


def losses(folder: Path) -> torch.Tensor:
    """Loss of every step."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def test_precision_of_the_launcher_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate reads it from its file; checks, estimate and report must know of it, too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = train(tmp_path, "coop", save_strategy="no", max_steps=1)
    assert trainer.args.bf16
    assert json.loads((tmp_path / "training_summary.json").read_text())["training"]["bf16"] is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16=True only on a GPU"):
        train(tmp_path, "coop", max_steps=1)


@pytest.mark.parametrize("method", RUNS)
def test_losses_in_bf16_are_near_those_in_float32(folder: Path, method: str) -> None:
    """bfloat16 has 8 bits: scaled logits move by a few hundredths, which is 5 percent of a loss."""
    expected, actual = (losses(folder / variant / method) for variant in ("float32", "bf16"))
    assert len(expected) >= 4
    assert not torch.equal(actual, expected)  # or bf16 was ignored
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", RUNS)
def test_recomputed_activations_change_no_loss(folder: Path, method: str) -> None:
    """In both towers: a layer that draws or counts would do so twice."""
    expected, actual = (losses(folder / variant / method) for variant in ("float32", "recomputed"))
    assert len(expected) >= 4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("method", RUNS)
def test_losses_in_fp16_with_loss_scaling_are_near_those_in_float32(tmp_path: Path, method: str) -> None:
    """The scaler's first factor overflows, which costs a step or two and must not stop the run."""
    results = {}
    for name, options in (("float32", {}), ("fp16", {"fp16": True}), ("bf16", {"bf16": True})):
        place = tmp_path / name
        own = {
            "save_strategy": "no",
            "num_train_epochs": 4,
            "warmup_epochs": 0,
            "use_cpu": False,
            "learning_rate": RATES[method],
        }
        trainer = train(place, method, **own, **options)
        assert (trainer.accelerator.scaler is not None) == (name == "fp16")
        results[name] = losses(place)[-4:]
    for name in ("fp16", "bf16"):
        torch.testing.assert_close(results[name], results["float32"], rtol=0.1, atol=0.1)


@pytest.mark.gpu
def test_a_resumed_fp16_run_goes_on_with_its_scaler(tmp_path: Path) -> None:
    """A scaler that starts anew at 65536 overflows and leaves out steps that the straight run made."""
    options = {"fp16": True, "use_cpu": False, "num_train_epochs": 4}
    straight = train(tmp_path, "coop", **options)
    resumed = train(tmp_path / "resumed", "coop", resume=str(tmp_path / "checkpoint-8"), **options)
    assert resumed.accelerator.scaler.state_dict() == straight.accelerator.scaler.state_dict()
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_fp16_on_the_cpu_is_refused(tmp_path: Path) -> None:
    """torch would train in float32 and say nothing."""
    with pytest.raises(ValueError, match="fp16=True only on a GPU, got a CPU run.*bf16=True"):
        train(tmp_path, "coop", fp16=True)


def check_compiled(folder: str, method: str) -> None:
    """Train one epoch as usual and with `torch_compile`, whose tracer alone runs: no compiler is needed."""
    options = {"save_strategy": "no", "max_steps": 4, "learning_rate": RATES[method], "warmup_epochs": 0}
    train(Path(folder) / "usual", method, **options)
    train(Path(folder) / "compiled", method, torch_compile=True, torch_compile_backend="eager", **options)


@pytest.mark.parametrize(
    "method",
    [
        method if method in ("promptkd", "skip_tuning") else pytest.param(method, marks=pytest.mark.slow)
        for method in RUNS
    ],
)
def test_a_compiled_step_has_the_same_loss(tmp_path: Path, method: str) -> None:
    """A draw, a count or a cache that the tracer freezes into its program would not change any more."""
    forked.run(tmp_path / "log.txt", check_compiled, str(tmp_path), method)
    assert len(losses(tmp_path / "usual")) == 4
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "usual"), rtol=1e-4, atol=1e-5)
