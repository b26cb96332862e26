"""The TVP example as a user runs it: a few steps on the bundled multimodal models and images."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from peft_vlm.evaluation.transfer import TransferReport
from peft_vlm.methods.tvp import prompt_of
from tests.scripts import run_script
from tests.source_tree import ROOT
from tests.training.test_offloaded_training import PLACES

ASSETS = ROOT / "examples" / "assets"
SMALL = ("--shots", "1", "--test_images", "12", "--seeds", "1", "--epochs", "1", "--use_cpu")


def run(output: Path, *arguments: str) -> str:
    result = run_script("examples/train_tvp.py", *SMALL, "--output_dir", str(output), *arguments)
    assert result.code == 0, result.printed
    return result.printed


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """One source, two unseen models, two variants."""
    folder = tmp_path_factory.mktemp("tvp")
    printed = run(folder, "--variants", "tvp", "visual_prompting")
    assert "mean of 2 unseen" in printed
    return folder


def test_reports_say_what_was_measured(output):
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["seeds"] == [1]
    assert list(metrics["variants"]) == ["tvp", "visual_prompting"]
    for variant in metrics["variants"].values():
        assert variant["sources"] == ["mllm_llava"]
        assert set(variant["models"]) == {"mllm_llava", "mllm_idefics3", "mllm_paligemma"}
        for figures in variant["models"].values():
            assert set(figures) == {"full_size", "shrunken", "prompted"}
            assert all(0 <= value <= 100 for values in figures.values() for value in values)
        assert len(variant["unseen_gain"]) == 1
    assert metrics["variants"]["visual_prompting"]["settings"]["fca_weight"] == 0
    both = [variant["models"]["mllm_llava"]["shrunken"] for variant in metrics["variants"].values()]
    assert both[0] == both[1]  # the baseline has no prompt, whatever was trained


def test_each_run_leaves_a_prompt_that_other_models_load(output):
    folder = output / "tvp" / "seed1"
    report = TransferReport.load(folder / "transfer.json")
    assert report.unseen == ("mllm_idefics3", "mllm_paligemma")
    with Image.open(folder / "prompt.png") as picture:
        assert picture.size == (448, 448)
    (tensor,) = load_file(folder / "adapter_model.safetensors").values()
    assert tensor.shape == (3, 2, 2)
    assert tensor.abs().max() > 0
    other = AutoModelForImageTextToText.from_pretrained(ASSETS / "mllm_paligemma", dtype=torch.float32)
    assert torch.equal(prompt_of(PeftModel.from_pretrained(other, folder)), tensor)


def test_models_in_several_places_give_the_same_prompt(output, tmp_path):
    """What does not fit on one card is divided; it must not be moved as a whole between training and scoring."""
    models = ("--models", str(ASSETS / "mllm_llava"), "--device_map", json.dumps(PLACES))
    run(tmp_path, "--variants", "visual_prompting", "--gradient_checkpointing", *models)
    first, second = (
        load_file(folder / "visual_prompting" / "seed1" / "adapter_model.safetensors") for folder in (output, tmp_path)
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path)]
    assert len({str(found["variants"]["visual_prompting"]["models"]["mllm_llava"]) for found in scores}) == 1


def test_training_on_two_models(tmp_path):
    """The mean loss of both; what is left is unseen."""
    two = ("--sources", "mllm_llava", "mllm_idefics3")
    run(tmp_path, "--domain", "fashion", "--variants", "visual_prompting", *two)
    variant = json.loads((tmp_path / "metrics.json").read_text())["variants"]["visual_prompting"]
    assert variant["sources"] == ["mllm_llava", "mllm_idefics3"]
    assert variant["settings"]["num_models"] == 2
