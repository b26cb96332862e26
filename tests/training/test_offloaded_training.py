"""Training through a frozen base model whose weights accelerate keeps elsewhere (`device_map`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from peft_vlm.cli import main
from peft_vlm.errors import PeftVLMError
from peft_vlm.experiments.transfer import ImageTextModel
from tests import short_run
from tests.experiments.test_dry_run import Measured
from tests.short_run import MEMORY, QUESTION_RUNS, RUNS, train
from tests.source_tree import ROOT

#: Of accelerate about a parameter that is no module; without its place it refuses the map.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")

#: PEFT's LoRA puts its matrices on the layers that accelerate offloads.
TRAINED = [method for method in RUNS if method != "clip_lora"]
SOON = ("coop", "skip_tuning_answers", "tvp_questions")
MLLM = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
CLIP = ("text_model", "vision_model", "text_projection", "visual_projection")


def use_offloaded_models(patch: pytest.MonkeyPatch, places: dict[str, str], folder: Path) -> None:
    """Let `train` make models of which some parts lie in memory or on disk, and are loaded call by call."""
    llava, clip = short_run.tiny_llava, short_run.base_model

    def dispatched(model: Any, names: tuple[str, ...]) -> Any:
        device_map = {name: places.get(name, "disk") for name in names}
        device_map |= {"logit_scale": "cpu"} if names is CLIP else {}
        return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)

    patch.setattr(short_run, "tiny_llava", lambda: dispatched(llava(), MLLM))
    patch.setattr(short_run, "base_model", lambda: dispatched(clip(), CLIP))


def run(folder: Path, method: str, **arguments: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Final tensors and losses of a run of three steps or so."""
    settings = None if method in QUESTION_RUNS else MEMORY.get(method, {})
    arguments |= {"save_strategy": "no", "num_train_epochs": 1, "data": {"count": 12}, "settings": settings}
    trainer = train(folder, method, **arguments)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return get_peft_model_state_dict(trainer.model.model), losses


@pytest.mark.parametrize(
    "method", [m if m in SOON else pytest.param(m, marks=pytest.mark.slow) for m in TRAINED], ids=str
)
def test_a_base_model_on_disk_trains_the_same_adapter(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient through a weight that is gone, or a tensor made on `meta`, would be wrong or end the run."""
    expected, losses = run(tmp_path / "memory", method)
    with monkeypatch.context() as patch:
        use_offloaded_models(patch, {"model.vision_tower": "cpu", "vision_model": "cpu"}, tmp_path / "parts")
        tensors, found = run(tmp_path / "in parts", method)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        assert found == losses
    use_offloaded_models(monkeypatch, {}, tmp_path / "weights")
    tensors, found = run(tmp_path / "recomputed", method, activation_checkpointing=True)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert found == losses


def test_recomputed_layers_hold_no_offloaded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd keeps each weight that was loaded for the forward pass, so that all of them would be there at once."""
    peaks = {}
    layers = sum(p.nbytes for p in short_run.tiny_llava().model.language_model.layers.parameters())
    for place in ("memory", "disk"):
        with monkeypatch.context() as patch:
            if place == "disk":
                use_offloaded_models(patch, {}, tmp_path / "weights")
            for recomputes in (False, True):
                measured, folder = Measured(), tmp_path / f"{place}-{recomputes}"
                with torch.autograd.graph.saved_tensors_hooks(measured.pack, lambda held: held.tensor):
                    options = {"callbacks": (measured,), "activation_checkpointing": recomputes}
                    run(folder, "tvp_questions", **options)
                peaks[place, recomputes] = measured.peak
    # beside the layers, embeddings and projections are loaded too, and are recomputed by nothing
    plain, recomputed = (peaks["disk", recomputes] - peaks["memory", recomputes] for recomputes in (False, True))
    assert plain > layers
    assert plain - recomputed > 0.9 * layers


def test_trained_tensors_that_are_offloaded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradient would belong to a tensor on `meta`."""
    use_offloaded_models(monkeypatch, {}, tmp_path / "weights")
    with pytest.raises(PeftVLMError, match="trainable parameters in memory, got .*lora_A.*without `device_map`"):
        run(tmp_path / "run", "clip_lora")


#: The layers of a language model on disk; the rest in memory.
PLACES = {"model.language_model.layers": "disk", "model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
PLACES |= dict.fromkeys((f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb")), "cpu")
PLACES["lm_head"] = "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"), [("tvp", ["--objective", "tse_weight=0"]), ("skip_tuning", ["--config", "start_layer=2"])]
)
def test_the_command_trains_and_scores_a_model_in_several_places(
    method: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that must be in one place to be scored would end the run after its training."""
    assets = ROOT / "examples" / "assets"
    words = ["train", "--method", method, "--model", str(assets / "mllm_llava"), "--dataset", str(assets / "emoji")]
    words += ["--shots", "1", "--max_steps", "2", "--use_cpu", "--report_to", "none", "--json", *settings]
    found = []
    for name, flags in (("memory", []), ("places", ["--device_map", json.dumps(PLACES)])):
        assert main([*words, *flags, "--output_dir", str(tmp_path / name)]) == 0
        accuracy = json.loads(capsys.readouterr().out)["scores"]["accuracy"]
        found.append((accuracy, load_file(tmp_path / name / "adapter_model.safetensors")))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_a_clip_takes_no_map_of_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag would be read by nothing; one that is no JSON would be looked for among transformers' words."""
    assets = ROOT / "examples" / "assets"
    words = ["train", "--method", "coop", "--model", str(assets / "clip_student"), "--dataset", str(assets / "emoji")]
    assert main([*words, "--device_map", "auto", "--use_cpu", "--output_dir", str(tmp_path)]) == 2
    assert "take no `--device_map`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="to be 'auto' or JSON of parts and their places, got '{model'"):
        ImageTextModel.load(str(assets / "mllm_llava"), device_map="{model")
