"""Official CLIP-LoRA files become adapters of PEFT's LoRA with the recorded outputs, tensor by tensor."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm.cli import main
from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError
from peft_vlm.evaluation.classify import TextClassifier
from tests.parity.recorded import facts, recorded_clip, recorded_tokenizer, tensors

CASE, RECORDED = facts("LO2_lora_dropout"), tensors("LO2_lora_dropout")
TOWERS = ("text_model", "vision_model")


def recorded(group: str) -> dict[str, torch.Tensor]:
    """Recorded matrices by module."""
    return {n.removeprefix(f"{group}."): t for n, t in RECORDED.items() if n.startswith(group) and ".lora_" in n}


def official_file(path, group="in", *, towers=TOWERS, layers=range(4), **metadata):
    """A file as CLIP-LoRA saves it: text layers first, then vision layers, counted from 0."""
    values, weights = recorded(group), {}
    for tower in towers:
        for number in layers:
            own = {}
            for part in ("q_proj", "k_proj", "v_proj"):
                module = f"{tower}.encoder.layers.{number}.self_attn.{part}"
                own[part] = {f"w_lora_{matrix}": values[f"{module}.lora_{matrix}"].clone() for matrix in "AB"}
            weights[f"layer_{len(weights)}"] = own
    known = {"r": 2, "alpha": 1, "encoder": "both", "params": ["q", "k", "v"], "position": "all"}
    torch.save({"weights": weights, "metadata": known | metadata}, path)
    return path


def test_every_tensor_stands_where_it_was_trained(student_folder, tmp_path):
    """Layers of another tower or number have the same shapes."""
    names = CASE["classnames"]
    file = official_file(tmp_path / "lora.pt")
    report = convert(file, tmp_path / "adapter", base_model=student_folder, class_names=names)
    assert report.kind == "CLIP-LoRA"
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == len(report.used) == len(recorded("in")) == 48
    for name, tensor in recorded("in").items():
        assert torch.equal(stored[f"base_model.model.{name}.weight"], tensor)
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.use_rslora) == (2, 1, True)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj"}
    beside = json.loads((tmp_path / "adapter" / "peft_vlm.json").read_text())
    assert (beside["class_names"], beside["template"]) == (names, CASE["template"])


def test_the_trained_file_gives_the_recorded_cosines(student_folder, tmp_path, capsys):
    """By the command, as a user converts it."""
    file = official_file(tmp_path / "lora.pt", "expected.final")
    command = ["convert", str(file), "--base_model", str(student_folder), "--output_dir", str(tmp_path / "adapter")]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "CLIP-LoRA"
    clip = recorded_clip("weights_student")
    model = PeftModel.from_pretrained(clip, tmp_path / "adapter").eval()
    classifier = TextClassifier(model, recorded_tokenizer(), template=CASE["template"])
    logits = classifier.logits_for(tuple(CASE["classnames"]))(RECORDED["in.eval_images"]).detach()
    cosines = logits / clip.logit_scale.exp().item()
    assert_close(cosines, RECORDED["expected.final.eval_cosines"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["bottom", "all"])
def test_one_tower_alone(position, student_folder, tmp_path):
    """Without the metadata the vision layers would be counted as text layers."""
    file = official_file(tmp_path / "lora.pt", towers=("vision_model",), encoder="vision", position=position)
    convert(file, tmp_path / "adapter", base_model=student_folder)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 24
    assert all(".vision_model." in name for name in stored)
    model = PeftModel.from_pretrained(recorded_clip("weights_student"), tmp_path / "adapter")
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "of rank 4 and width 64, got shape"),
        ({"alpha": None}, "numbers `r` and `alpha` in the metadata"),
        ({"alpha": float("nan")}, "numbers `r` and `alpha` in the metadata"),
        ({"encoder": "text"}, "Expected 8 adapted layers.*'text' and 'all'"),
        ({"encoder": "audio"}, "Expected 8 adapted layers.*'audio'"),
        ({"position": "up", "layers": range(2)}, "Expected 4 adapted layers.*'up', which are 8"),
        ({"position": "mid"}, "which are 8. Pass the base"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message, student_folder, tmp_path):
    with pytest.raises(AdapterError, match=message):
        convert(official_file(tmp_path / "lora.pt", **settings), tmp_path / "a", base_model=student_folder)
    assert not (tmp_path / "a").exists()


def test_a_strangers_number_of_a_layer_asks_for_no_memory(student_folder, tmp_path):
    """A table of ten billion places would be made before anything is compared."""
    content = torch.load(official_file(tmp_path / "lora.pt"), weights_only=True)
    content["weights"]["layer_9999999999"] = content["weights"].pop("layer_7")
    torch.save(content, tmp_path / "far.pt")
    with pytest.raises(AdapterError, match="Expected names such as 'layer_0.q_proj.w_lora_A', got 'layer_9999999999"):
        convert(tmp_path / "far.pt", tmp_path / "a", base_model=student_folder)


@pytest.mark.parametrize("lost", ["w_lora_B", "q_proj", "layer_3"])
def test_a_file_that_is_not_whole_is_refused(lost, student_folder, tmp_path):
    """PEFT would leave B at zero, or a layer as it was, as if nothing had been trained there."""
    content = torch.load(official_file(tmp_path / "lora.pt"), weights_only=True)
    weights = content["weights"]
    del {"layer_3": weights, "q_proj": weights["layer_0"], "w_lora_B": weights["layer_0"]["q_proj"]}[lost][lost]
    torch.save(content, tmp_path / "half.pt")
    with pytest.raises(AdapterError, match="in each of 8 layers .* The file is not whole"):
        convert(tmp_path / "half.pt", tmp_path / "a", base_model=student_folder)
