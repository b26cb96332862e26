"""Frozen layers divided by FSDP2, with other models and settings than in `test_two_processes.py`; what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from peft_vlm import (
    ClassificationObjective,
    SkipTuningConfig,
    SkipTuningObjective,
    TVPConfig,
    TVPObjective,
    VLMTrainer,
    VLMTrainingArguments,
)
from peft_vlm.errors import DataError, UnsupportedModelError
from peft_vlm.models.sharding import shard_frozen_layers
from peft_vlm.text import candidate_scores, tokenize_for_model
from peft_vlm.training.arguments import FSDP_SETTINGS
from tests import forked
from tests.cases import CASES, base_model, class_prompts, images
from tests.short_run import train
from tests.source_tree import ROOT
from tests.tiny import colour_names, colour_rows, noise_image, tiny_clip, tiny_siglip, tiny_tokenizer
from tests.tiny_mllm import ARCHITECTURES, tiny_mllm

#: Of a gradient or an output, as a share of the largest: other orders of float32 sums.
CLOSE = 1e-5


def share_of_largest(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def prompted(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A multimodal model with a pixel prompt, and questions about two images."""
    mllm = tiny_mllm(name)
    inputs = mllm.inputs([noise_image(60, 40, seed=0), noise_image(60, 40, seed=1)])
    config = TVPConfig.for_processor(mllm.image_processor, canvas_size=32, border=5)
    return get_peft_model(mllm.model, config).eval(), inputs


def tuned(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same model with tuned language layers."""
    mllm = tiny_mllm(name)
    inputs = mllm.inputs([noise_image(60, 40, seed=0), noise_image(60, 40, seed=1)])
    torch.manual_seed(0)
    return get_peft_model(mllm.model, SkipTuningConfig(start_layer=1, init_weights=False)).eval(), inputs


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and all gradients one behind the other."""
    logits = model(**inputs).logits
    logits.float().pow(2).mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare_architectures(folder: str) -> None:
    """Outputs and gradients of every multimodal architecture, whole and divided."""
    distributed.init_process_group("gloo")
    found = {}
    for make in (prompted, tuned):
        for name in sorted(ARCHITECTURES):
            (whole, inputs), (divided, _) = make(name), make(name)
            expected = gradients(whole, inputs)
            shard_frozen_layers(divided, torch.device("cpu"))
            actual = gradients(divided, inputs)
            values = [p for p in divided.parameters() if not p.requires_grad]
            found[f"{make.__name__} {name}"] = {
                "divided": sum(p.numel() for p in values if isinstance(p, DTensor)) / sum(p.numel() for p in values),
                "logits": share_of_largest(actual[0], expected[0]),
                "gradients": share_of_largest(actual[1], expected[1]),
            }
    (Path(folder) / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_multimodal_models_give_what_they_give_whole(tmp_path: Path) -> None:
    """Each architecture has layers of its own, on the vision side, between the two, and in the language model."""
    forked.run_group(tmp_path, compare_architectures, str(tmp_path))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 2 * len(ARCHITECTURES) == 24
        for name, values in found.items():
            assert values["divided"] > 0.3, (name, values)  # the embeddings of these tiny models are most of them
            assert values["logits"] < CLOSE, (name, values)
            assert values["gradients"] < CLOSE, (name, values)


#: Settings of a run under which layers run again, in other types, or keep their weights.
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"gradient_checkpointing": True},
    "bf16": {"bf16": True, "learning_rate": 1e-3},
    "accumulated": {"gradient_accumulation_steps": 2},
}
METHODS = ("promptsrc", "skip_tuning", "cocoop", "tvp_questions", "skip_tuning_answers")


def train_variants(folder: str, size: int, **arguments: Any) -> None:
    """Short runs of some methods with each variant."""
    for variant, settings in VARIANTS.items():
        for method in METHODS:
            own = settings | arguments | {"save_strategy": "no", "per_device_train_batch_size": size}
            train(Path(folder) / f"{variant} {method}", method, **own)


def test_variants_of_a_run_equal_those_of_whole_models(tmp_path: Path) -> None:
    """Two processes with whole models (DDP) and with divided layers: the same sums, in the same order."""
    for kind, settings in {"ddp": {}, "fsdp": {"fsdp": True}}.items():
        (tmp_path / kind).mkdir()
        forked.run_group(tmp_path / kind, train_variants, str(tmp_path / kind), 4, **settings)
    names = [f"{variant} {method}" for variant in VARIANTS for method in METHODS]
    for name in names:
        expected, actual = (read(tmp_path / kind / name) for kind in ("ddp", "fsdp"))
        if name.startswith("bf16"):  # texts run whole in place of packed, and bfloat16 rounds each sum
            assert actual["losses"].tolist() == pytest.approx(expected["losses"].tolist(), rel=0.05, abs=0.05), name
            continue
        assert_close(actual, expected, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def read(folder: Path) -> dict[str, Tensor]:
    """Final tensors of the second process, and all losses."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    losses = torch.tensor([entry["loss"] for entry in history if "loss" in entry])
    assert len(losses) >= 2
    return {**load_file(folder / "final-1.safetensors"), "losses": losses}


def resume_the_other_way(folder: str) -> None:
    """Half a run with whole models, then the rest with divided layers; and the other way round."""
    for first, second in ((None, True), (True, None)):
        place = Path(folder) / f"{first}-{second}"
        train(place, "promptsrc", fsdp=first, max_steps=4)
        train(place, "promptsrc", fsdp=second, max_steps=6, resume="auto")
    train(Path(folder) / "unbroken", "promptsrc", max_steps=6)


def test_a_checkpoint_goes_on_with_or_without_divided_layers(tmp_path: Path) -> None:
    """It holds trainable tensors and their optimizer, which are whole in either case."""
    forked.run_group(tmp_path, resume_the_other_way, str(tmp_path))
    expected = load_file(tmp_path / "unbroken" / "final-0.safetensors")
    for name in ("None-True", "True-None"):
        assert_close(load_file(tmp_path / name / "final-0.safetensors"), expected, rtol=1e-3, atol=2e-5)
        assert not any(torch.equal(value, torch.zeros_like(value)) for value in expected.values())


def siglip_run(folder: str, size: int, **arguments: Any) -> None:
    """Skip Tuning and TVP on a SigLIP."""
    torch.set_num_threads(1)
    for name in ("skip_tuning", "tvp"):
        torch.manual_seed(0)
        model, dataset = tiny_siglip(), images().select(range(16))
        config: Any = SkipTuningConfig(start_layer=1)
        if name == "tvp":
            config = TVPConfig(canvas_size=16, border=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        model = get_peft_model(model, config)
        prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names, template="a photo of a {}.")
        objective: Any = SkipTuningObjective(prompts) if name == "skip_tuning" else TVPObjective(prompts, tse_weight=0)
        own = {"max_steps": 4, "per_device_train_batch_size": size, "use_cpu": True, "report_to": "none"}
        args = VLMTrainingArguments(f"{folder}/{name}", save_strategy="no", disable_tqdm=True, **(own | arguments))
        trainer = VLMTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, objective=objective)
        trainer.train()
        values = {"accuracy": trainer.evaluate()["eval_accuracy"], "loss": trainer.state.log_history[-2]["train_loss"]}
        Path(folder, f"{name}-{args.process_index}.json").write_text(json.dumps(values))


def test_siglip_trains_as_in_one_process(tmp_path: Path) -> None:
    """Its towers have layers of another class, and a pooling head that stays whole."""
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
    forked.run(tmp_path / "log.txt", siglip_run, str(tmp_path / "one"), 8)
    forked.run_group(tmp_path / "two", siglip_run, str(tmp_path / "two"), 4, fsdp=True)
    for name in ("skip_tuning", "tvp"):
        expected, actual = (json.loads((tmp_path / kind / f"{name}-0.json").read_text()) for kind in ("one", "two"))
        assert actual == pytest.approx(expected, rel=1e-4), name


def one_after_the_other(folder: str) -> None:
    """Several methods on one base model, each as on a model of its own; then what a divided model is refused."""

    def run(method: str, base: nn.Module, *, fsdp: bool = True) -> tuple[nn.Module, list[float]]:
        (case,) = [case for case in CASES if case.method == method]
        torch.manual_seed(0)
        model = get_peft_model(base, case.config())
        own: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1}
        args = VLMTrainingArguments(f"{folder}/{method}", save_strategy="no", disable_tqdm=True, fsdp=fsdp, **own)
        data = images().select(range(16))
        objective = case.objective(class_prompts())
        trainer = VLMTrainer(model, args, train_dataset=data, eval_dataset=data, objective=objective)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
        return model, [*(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), accuracy]

    shared = base_model()
    for method in ("coop", "promptsrc", "rpp", "clip_lora", "maple", "coop"):
        model, found = run(method, shared)
        shared = model.unload()
        assert len(found) == 3
        assert found == run(method, base_model())[1], method
    with pytest.raises(UnsupportedModelError, match=r"Expected a whole model.*`fsdp=True` too"):
        run("coop", shared, fsdp=False)
    with pytest.raises(UnsupportedModelError, match=r"Expected whole trainable parameters.*Load the base model again"):
        run("skip_tuning", model.unload())  # whose trained copies of layers would be divided, too


def test_a_divided_model_takes_one_adapter_after_the_other(tmp_path: Path) -> None:
    """An adapter around a layer, divided with it, once left weights that nothing gathers; a training of divided
    weights ended in a file that could not be written.
    """
    forked.run_group(tmp_path, one_after_the_other, str(tmp_path))


def how_it_is_said(folder: str) -> None:
    """Words of a command line, and settings that are copied with a change."""
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none"}
    for value, is_on in {"True": True, "true": True, "full_shard": True, "False": False, "false": False}.items():
        args = VLMTrainingArguments(folder, fsdp=value, **options)
        assert args.has_sharded_layers is is_on, value
        assert replace(args, seed=1).has_sharded_layers is is_on, value
    with pytest.raises(ValueError, match="nothing about it can be chosen"):
        VLMTrainingArguments(folder, fsdp=True, fsdp_config={"min_num_params": 5}, **options)


def test_fsdp_is_switched_on_by_what_transformers_takes(tmp_path: Path) -> None:
    """`--fsdp True` was refused for not being True; a copy of the settings trained with whole models."""
    forked.run_group(tmp_path, how_it_is_said, str(tmp_path))


def what_is_refused() -> None:
    """Runs that could not be right, each with its message."""
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "fsdp": True}
    args = VLMTrainingArguments("unused", **options)
    data, clip = images(), tiny_clip()
    prompts = tokenize_for_model(clip, tiny_tokenizer(), data.class_names, template="a photo of a {}.")
    with pytest.raises(UnsupportedModelError, match=r"Expected frozen transformer layers.*Train without `fsdp`"):
        VLMTrainer(clip, args, train_dataset=data, objective=ClassificationObjective(prompts))
    with pytest.raises(ValueError, match="no `torch_compile` with `fsdp`"):
        VLMTrainingArguments("unused", torch_compile=True, **options)
    quantised, _ = prompted("llava")
    layer = next(m for m in quantised.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="got 1 quantised ones, which stay whole"):
        shard_frozen_layers(quantised, torch.device("cpu"))
    model, inputs = prompted("llava")
    shard_frozen_layers(model, torch.device("cpu"))
    with pytest.raises(DataError, match="divide=False`"):
        candidate_scores(model, inputs, ["a", "b"], tokenizer=tiny_mllm("llava").tokenizer, divide=True)


def machines_of_different_size() -> None:
    """Three processes, as a launcher would start two on one machine and one on another."""
    distributed.init_process_group("gloo")
    os.environ["LOCAL_WORLD_SIZE"] = "2" if distributed.get_rank() < 2 else "1"
    with pytest.raises(UnsupportedModelError, match=r"equally many processes on every machine.*\[1, 2\]"):
        shard_frozen_layers(tiny_clip().requires_grad_(False), torch.device("cpu"))
    distributed.destroy_process_group()


def test_machines_of_different_size_are_refused(tmp_path: Path) -> None:
    """Each machine divides a cache among its own processes: some would wait for layers that nobody calls."""
    forked.run_group(tmp_path, machines_of_different_size, processes=3)


def test_what_cannot_be_divided_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Full fine-tuning would hold the whole model, parts of candidates would wait for each other forever."""
    forked.run_group(tmp_path, what_is_refused)


@pytest.mark.parametrize("name", FSDP_SETTINGS)
def test_settings_of_the_launcher_that_nothing_reads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file of another project asks for offloading, a wrapping policy, ...: the run would be without them."""
    monkeypatch.setenv("PEFT_VLM_USE_FSDP", "true")
    monkeypatch.setenv(name, {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "false"}.get(name, "something"))
    with pytest.raises(ValueError, match=rf"Expected `{name.lower()}: .*` in the launcher's file, got '"):
        VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def test_a_launcher_that_compiles_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dynamo_config` in its file reaches accelerate past the arguments."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="no `torch_compile` with `fsdp`.*got the backend 'inductor'"):
        VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True)


def test_one_process_has_nobody_to_divide_with(tmp_path: Path) -> None:
    """It would train alone, with the whole model, and call it FSDP."""
    with pytest.raises(ValueError, match=r"Expected several processes.*fsdp2\.yaml"):
        VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True)
    with pytest.raises(ValueError, match="Expected `fsdp` to be True, got 'offload'"):
        VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp="offload")


def launched(*words: str) -> str:
    """Run a script in two CPU processes by the launcher's file; what it printed as messages."""
    file = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
    options = ["--config_file", str(file), "--num_processes", "2", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.slow
def test_the_launchers_file_divides_the_layers(tmp_path: Path) -> None:
    """Accelerate itself would wrap the whole model on GPUs, and nothing on a CPU."""
    printed = launched("-m", "tests.short_run", str(tmp_path), "--method", "coop")
    assert "6 steps to go, frozen layers divided among the processes." in printed


@pytest.mark.slow
def test_a_prompt_is_trained_twice_and_measured_on_a_divided_model(tmp_path: Path) -> None:
    """The example trains one model with several settings, and the main process measures it."""
    words = ["--models", "examples/assets/mllm_llava", "examples/assets/mllm_idefics3", "--variants", "tvp", "no_tse"]
    words += ["--seeds", "1", "--epochs", "1", "--shots", "1", "--test_images", "4", "--use_cpu"]
    printed = launched("examples/train_tvp.py", *words, "--output_dir", str(tmp_path))
    assert "frozen layers divided among the processes." in printed
    variants = json.loads((tmp_path / "metrics.json").read_text())["variants"]
    assert [len(variant["models"]) for variant in variants.values()] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tvp", "skip_tuning"])
def test_the_command_trains_a_bundled_multimodal_model_as_one_process(tmp_path: Path, method: str) -> None:
    """The test after the training runs on the divided model, which one process alone would wait in forever."""
    for seed, split in enumerate(("train", "test")):
        for number, row in enumerate(colour_rows(3, seed=seed)):
            place = tmp_path / "images" / split / colour_names()[int(row["label"])]
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{number}.png")
    words = ["--method", method, "--model", "examples/assets/mllm_llava", "--dataset", str(tmp_path / "images")]
    words += ["--shots", "2", "--max_steps", "3", "--use_cpu", "--report_to", "none", "--question", "what is this?"]
    words += ["--objective", "tse_weight=0"] if method == "tvp" else ["--config", "start_layer=3"]
    launchers = {1: ["-m"], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]}
    found, tensors = {}, {}
    for processes, launcher in launchers.items():
        own = [f"--per_device_train_batch_size={4 // processes}", "--output_dir", str(tmp_path / str(processes))]
        own += ["--fsdp", "true"] if processes == 2 else []
        command = [sys.executable, *launcher, "peft_vlm.cli", "train", *words, *own, "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[processes] = json.loads(result.stdout)["scores"]["accuracy"]
        tensors[processes] = load_file(tmp_path / str(processes) / "adapter_model.safetensors")
    assert found[2] == pytest.approx(found[1], abs=6.0), "an image may fall on the other side by rounding"
    assert_close(tensors[2], tensors[1], rtol=1e-3, atol=2e-5)
