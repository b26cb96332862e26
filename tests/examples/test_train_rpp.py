"""The RPP example as a user runs it, in a few steps: pretraining, transfer, few-shot starts; and what it leaves."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_vlm import PromptedClassifier
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.streaming import load_image_stream
from peft_vlm.data.transforms import EvalTransform
from tests.scripts import run_script, start_script
from tests.source_tree import ROOT
from tests.tiny import clip_processor

ASSETS = ROOT / "examples" / "assets"


def test_the_committed_corpus_has_thousands_of_classes_and_a_list_of_them():
    """Two training images of each class, and a validation image of 1,500 of them."""
    folder = ASSETS / "pretraining"
    train, validation = (load_image_dataset(folder, split=split) for split in ("train", "validation"))
    assert len(train.class_names) > 3000
    assert len(train) == 2 * len(train.class_names)
    assert len(validation) == 1500
    assert list(train.class_names) == (folder / "class_names.txt").read_text().splitlines()
    stream = load_image_stream(str(folder), transform=EvalTransform(clip_processor()), num_images=100)
    assert stream.class_names == train.class_names


@pytest.mark.slow
def test_rpp_from_start_to_finish(tmp_path: Path):
    """Started again, the finished pretraining is not repeated."""
    arguments = ("--use_cpu", "--max_steps", "3", "--num_sampled_classes", "16", "--output_dir", str(tmp_path))
    weights = tmp_path / "pretrained" / "adapter_model.safetensors"
    written = []
    for further in (("--shots",), ("--shots", "1", "--seeds", "1")):
        result = run_script("examples/train_rpp.py", *arguments, *further)
        assert result.code == 0, result.printed
        written.append(weights.read_bytes())
    assert written[0] == written[1]
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["transfer"]) == {"zero_shot", "rpp"}
    assert set(report["transfer"]["rpp"]) == {"icons", "emoji", "fashion", "mean"}
    assert set(report["few_shot"]["1"]) == {"zero_shot", "rpp", "words", "random"}
    names = (tmp_path / "pretrained" / "class_names.txt").read_text().splitlines()
    assert len(names) > 3000
    classifier = PromptedClassifier.from_pretrained(tmp_path / "pretrained")
    assert classifier.class_names == tuple(names)
    image = load_image_dataset(ASSETS / "icons", split="test").image(0)
    assert classifier.predict(image, class_names=["airplane", "anchor"])[0].probability > 0.5


@pytest.mark.slow
def test_a_killed_run_of_the_example_continues(tmp_path: Path):
    """The same command, once to its end, and once killed after its first checkpoint and started again."""
    script = "examples/train_rpp.py"
    options = ("--use_cpu", "--max_steps", "55", "--num_sampled_classes", "16", "--shots", "--output_dir")
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log.txt"
    result = run_script(script, *options, str(whole))
    assert result.code == 0, result.printed
    process = start_script(log, script, *options, str(killed))
    while not (killed / "pretrained" / "checkpoint-50").exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (killed / "pretrained" / "adapter_model.safetensors").exists()
    result = run_script(script, *options, str(killed))
    assert result.code == 0, result.printed
    first, second = (load_file(folder / "pretrained" / "adapter_model.safetensors") for folder in (whole, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    reports = [json.loads((folder / "metrics.json").read_text())["transfer"] for folder in (whole, killed)]
    assert reports[0] == reports[1]
