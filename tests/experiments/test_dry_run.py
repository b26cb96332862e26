"""`peft-vlm train --dry-run` against the tensors of a real step."""

import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, TrainerCallback

from peft_vlm import RPPObjective, SkipTuningObjective
from peft_vlm.cli import main
from peft_vlm.cli.train import arguments_maker
from peft_vlm.experiments.dry_run import DryRun, dry_run
from peft_vlm.experiments.run import run_training
from peft_vlm.settings import RunSettings
from tests.cases import class_prompts
from tests.source_tree import ROOT

ASSETS = ROOT / "examples" / "assets"
#: The share by which an estimate may miss what is measured.
TOLERANCE = 0.15
BATCH = 8
FLAGS = ["--use_cpu", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


class Held:
    """A tensor that autograd keeps, until it lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Measured(TrainerCallback):
    """Tensor memory of a run: each storage once, parameters apart."""

    def __init__(self) -> None:
        self.live: dict[int, list[int]] = {}
        self.bytes = self.peak = 0
        self.own: set[int] = set()
        self.fixed = self.trained = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Take note of weights, gradients and momentum."""
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        self.own = set(tensors)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.fixed = sum(t.nbytes for t in tensors.values()) + 4 * 2 * self.trained  # gradients and momentum

    def pack(self, tensor: Tensor) -> Held:
        """Count a tensor."""
        held, storage = Held(tensor), tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.own:
            count = self.live.setdefault(key, [0, storage.nbytes()])
            self.bytes += 0 if count[0] else count[1]
            count[0] += 1
            weakref.finalize(held, self.release, key)
            self.peak = max(self.peak, self.bytes)
        return held

    def release(self, key: int) -> None:
        """Forget a tensor."""
        count = self.live[key]
        count[0] -= 1
        if not count[0]:
            self.bytes -= count[1]
            del self.live[key]


def settings_of(method: str, model: str, **more: object) -> RunSettings:
    """A run on the bundled icons."""
    text = {"template": "a {} icon", "dataset": str(ASSETS / "icons"), "shots": 1, "evaluate": False}
    return RunSettings(method=method, model=str(ASSETS / model), **(text | more))


def arguments_in(folder: Path, *flags: str) -> Any:
    """The function that makes the training arguments."""
    words = ["--output_dir", str(folder), *FLAGS, "--per_device_train_batch_size", str(BATCH), *flags]
    return arguments_maker(words, {"disable_tqdm": True}, usage="peft-vlm train", has_preset=False)


def both(settings: RunSettings, folder: Path) -> tuple[DryRun, Measured]:
    """The dry run, and a step that is measured."""
    arguments = arguments_in(folder)
    counted, measured = dry_run(settings, arguments), Measured()
    with torch.autograd.graph.saved_tensors_hooks(measured.pack, lambda held: held.tensor):
        run_training(settings, arguments, callbacks=[measured])
    return counted, measured


NO_TSE: dict[str, object] = {"objective": ["tse_weight=0"]}
TAUGHT: dict[str, object] = {"teacher": str(ASSETS / "clip_teacher")}
CASES: list[tuple[str, str, dict[str, object]]] = [
    ("clip_student", "coop", {}),
    ("clip_student", "promptsrc", {}),
    ("clip_student", "promptkd", TAUGHT | {"transductive": True}),
    ("clip_student", "tvp", NO_TSE),
    ("clip_student", "skip_tuning", {}),  # selects some of the classes
    ("mllm_llava", "tvp", NO_TSE),
    ("mllm_idefics3", "tvp", NO_TSE),
]
SLOW = [
    ("clip_student", "maple", {}),
    ("clip_student", "clip_lora", {}),
    ("clip_student", "rpp", TAUGHT),
    ("clip_student", "rpp", TAUGHT | {"objective": ["num_sampled_classes=24"]}),
    ("clip_student", "skip_tuning", {"objective": ["top_ratio=10", "batch_composition=one_class"], "shots": 8}),
    ("mllm_llava", "skip_tuning", {}),
    ("mllm_paligemma", "tvp", NO_TSE),
]


@pytest.mark.parametrize(
    ("model", "method", "more"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_dry_run_is_within_15_percent_of_a_measured_step(
    model: str, method: str, more: dict[str, object], tmp_path: Path
) -> None:
    """An estimate that is wrong sends people to a card on which the run dies, or to a larger one for nothing."""
    counted, measured = both(settings_of(method, model, **more), tmp_path)
    teacher = sum(t.numel() * 4 for t in load_file(ASSETS / "clip_teacher" / "model.safetensors").values())
    totals = counted.totals()
    assert totals["peak"] == pytest.approx(
        measured.fixed + measured.peak + (teacher if "teacher" in more else 0), rel=TOLERANCE
    )
    assert totals["activations"] == pytest.approx(measured.peak, rel=TOLERANCE)
    assert sum(layer.trainable for layer in counted.layers) == measured.trained


def test_sampled_classes_and_chunks_of_them_are_counted_as_the_step_runs_them() -> None:
    """A thousand drawn classes of 21,841 are what a card must hold, and one chunk of them where it recomputes."""
    settings = {"num_sampled_classes": 1000, "text_chunk_size": None}
    texts = RPPObjective.texts_per_step
    assert texts(21_841, batch_size=32, settings=settings) == 1031
    assert texts(500, batch_size=32, settings=settings) == 500
    assert texts(21_841, batch_size=32, settings=settings | {"text_chunk_size": 100}) == 100
    skip = {"top_ratio": 0.5, "max_top": 50, "tail_scale": 0.3, "seed": 0, "batch_composition": "random"}
    objective = SkipTuningObjective(class_prompts([f"class {number}" for number in range(300)]))
    chosen = int((objective.tail_uniform < objective.keep_probability).sum())
    assert SkipTuningObjective.texts_per_step(300, batch_size=4, settings=skip) == chosen < 200
    assert SkipTuningObjective.texts_per_step(300, batch_size=64, settings=skip) == chosen + 14


def llava(folder: Path, *, width: int, layers: int, intermediate: int) -> Path:
    """The configuration of a LLaVA-1.5 in float16."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": intermediate, "vocab_size": 32064}
    text |= {"num_attention_heads": width // 128, "num_key_value_heads": width // 128}
    parts = {"vision_config": CLIPVisionConfig(**vision), "text_config": LlamaConfig(**text)}
    LlavaConfig(**parts, image_token_index=32000, dtype="float16").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", ["tvp", "skip_tuning"])
def test_the_documented_commands_fit_on_the_cards_they_name(
    page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command of the docs that names a retired flag, or a card that is too small, is found out after a download."""
    text = (ROOT / "docs" / "methods" / f"{page}.md").read_text().replace("\\\n", " ")
    commands = [
        line.split() for line in text.splitlines() if line.startswith("peft-vlm train") and "--dry-run" in line
    ]
    small = llava(tmp_path / "7b", width=4096, layers=32, intermediate=11008)
    large = llava(tmp_path / "13b", width=5120, layers=40, intermediate=13824)
    places = {"llava-hf/llava-1.5-7b-hf": str(small), "llava-hf/llava-1.5-13b-hf": str(large)}
    places["<folder>"] = str(ASSETS / "icons")
    found = []
    for command in commands:
        assert main([*(places.get(word, word) for word in command[1:]), "--json", *FLAGS]) == 0
        found.append(json.loads(capsys.readouterr().out)["totals"]["peak"] / 1e9)
    assert len(found) == 2
    assert found[0] < 24
    assert 24 < found[1] < 2 * 24
    assert all(f"{peak:.1f} GB" in text for peak in found), found


def test_recomputed_layers_keep_their_input_alone() -> None:
    """With checkpointing a layer costs its input, and the largest one exists once more in the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers rename the flag
        plain, lean = (
            dry_run(settings_of("tvp", "mllm_llava", **NO_TSE), arguments_in(Path("unused"), *flags))
            for flags in ((), ("--gradient_checkpointing",))
        )
    for before, after in zip(plain.layers, lean.layers, strict=True):
        if before.states:
            assert after.activations < before.activations / 5
            assert after.activations >= BATCH * before.states * 0.99
    assert lean.recomputed == max(layer.activations for layer in plain.layers)


def test_a_model_of_the_hub_needs_its_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run that loaded weights, or wanted them, would be no use before a card is bought."""
    config = json.loads((ASSETS / "mllm_llava" / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824}
    config["text_config"] |= {"num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["train", "--method", "tvp", "--model", str(tmp_path), "--dataset", str(ASSETS / "icons"), "--json"]
    before = set(tmp_path.iterdir())
    main([*words, "--dry-run", *FLAGS, "--per_device_train_batch_size", "8"])
    report = json.loads(capsys.readouterr().out)
    assert set(tmp_path.iterdir()) == before
    layers = [layer for layer in report["layers"] if ".language_model.layers." in layer["name"]]
    assert len(layers) == 40
    # Attention 4 x 5120 x 5120, gated MLP 3 x 5120 x 13824, two norms, in float32.
    assert layers[0]["parameters"] == 4 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120)
    assert "No processor" in report["notes"][0]
    assert report["totals"]["peak"] > 50e9
