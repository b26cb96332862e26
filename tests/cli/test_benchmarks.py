"""`--data_root`: published benchmarks by name, with what changes their numbers: template, shots, halves, classes."""

import csv
import json
from pathlib import Path

import pytest
from transformers import CLIPProcessor

from peft_vlm.cli import main
from peft_vlm.data import load_benchmark
from peft_vlm.data.splits import image_sample
from tests.benchmark_trees import write_trees
from tests.tiny import clip_processor, tiny_clip, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all trees in `DATA` and a tiny CLIP in `clip`."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_trees(root / "DATA")
    tiny_clip().save_pretrained(root / "clip")
    CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer()).save_pretrained(root / "clip")
    return root


def train(root: Path, output: Path, *words: str) -> int:
    """One step of CoOp."""
    flags = ["--model", str(root / "clip"), "--data_root", str(root / "DATA"), "--config", "context_init=a"]
    flags += ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--output_dir", str(output)]
    return main(["train", "--method", "coop", *flags, *words])


def test_a_benchmark_is_trained_by_name_with_its_own_template(root: Path, tmp_path: Path) -> None:
    """With the general template, every number of the table would be another one."""
    run = tmp_path / "run"
    words = ["--dataset", "ucf101", "--protocol", "base_to_new", "--shots", "2", "--seed", "1"]
    assert train(root, run, *words) == 0
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["template"] == "a photo of a person doing {}."
    assert config["class_names"] == ["Apply_Eye_Makeup", "Yo_Yo"]
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["training_images"]["count"] == 4
    drawn = load_benchmark("ucf101", root / "DATA", shots=2, seed=1, classes="base")
    assert summary["training_images"]["sample"] == image_sample(drawn)
    report = json.loads((run / "report.json").read_text())
    assert set(report["scores"]) == {"base", "new", "h"}
    baseline = json.loads((run / "zero_shot.json").read_text())
    assert report["template"] == baseline["template"] == ["a photo of a person doing {}."]


def test_a_checkpoint_is_chosen_on_the_validation_shots_of_coops_code(root: Path, tmp_path: Path) -> None:
    """At most 4 images of each base class; all of them would be another, better choice, and ImageNet has none."""
    choice = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    choice += ["--eval_split", "val", "--load_best_model_at_end", "--protocol", "base_to_new", "--shots", "1"]
    assert train(root, tmp_path / "run", "--dataset", "dtd", "--seed", "1", *choice) == 0
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    chosen = load_benchmark("dtd", root / "DATA", split="val", shots=1, seed=1, classes="base")
    assert len(chosen) == 2
    assert summary["selection"]["sample"] == image_sample(chosen)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["selected_on_test"] is False
    assert train(root, tmp_path / "none", "--dataset", "imagenet", *choice) == 2


def test_a_cross_dataset_source_is_trained_on_all_classes_of_imagenet(root: Path, tmp_path: Path) -> None:
    """Trained on base classes, the source would not be the papers'; targets have their own classes."""
    run = tmp_path / "run"
    assert train(root, run, "--dataset", "imagenet", "--shots", "1", "--no_evaluate") == 0
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["class_names"] == ["tench", "stingray", "lynx", "sunglass", "sunglasses"]
    targets = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
    evaluate = ["evaluate", "--adapter", str(run), "--data_root", str(root / "DATA"), "--no_plots"]
    evaluate += ["--save_predictions"]
    out = tmp_path / "shift"
    assert main([*evaluate, "--protocol", "domain-shift", "--dataset", *targets, "--output_dir", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["scores"]) == [*targets, "average"]
    assert report["parts"]["imagenet_a"]["num_images"] == 3
    with (out / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "imagenet_a"]
    assert [row["label"] for row in rows] == ["stingray", "lynx", "lynx"]
    assert {row["predicted"] for row in rows} <= {"stingray", "lynx"}, "others would be wrong in advance"
    assert report["template"] == ["a photo of a {}."], "the context was learned in it"


def test_the_model_alone_meets_each_target_in_its_own_template(root: Path, tmp_path: Path) -> None:
    """The zero-shot row of a cross-dataset table has one template per data set."""
    evaluate = ["evaluate", "--model", str(root / "clip"), "--data_root", str(root / "DATA"), "--no_plots"]
    evaluate += ["--output_dir", str(tmp_path)]
    several = ["--protocol", "cross-dataset", "--dataset", "dtd", "ucf101"]
    assert main([*evaluate, *several]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["template"] == ["{} texture.", "a photo of a person doing {}."]
    alone = {}
    for name in ("dtd", "ucf101"):
        assert main([*evaluate, "--protocol", "zero-shot", "--dataset", name]) == 0
        alone[name] = json.loads((tmp_path / "report.json").read_text())["scores"]["accuracy"]
    assert {name: report["scores"][name] for name in alone} == alone
    assert report["scores"]["average"] == sum(alone.values()) / 2
    assert main([*evaluate, *several, "--template", "a {}."]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["template"] == ["a {}."]


def test_a_wrong_root_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What to put where, and nothing written."""
    evaluate = [
        "evaluate",
        "--model",
        str(root / "clip"),
        "--protocol",
        "zero-shot",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main([*evaluate, "--data_root", str(tmp_path), "--dataset", "ucf101"]) == 2
    message = capsys.readouterr().err
    assert "The benchmark 'ucf101' lacks 'UCF-101-midframes' (what UCF-101-midframes.zip unpacks to" in message
    assert "split_zhou_UCF101.json" in message
    assert main([*evaluate, "--data_root", str(root / "DATA"), "--dataset", "Caltech101"]) != 0
    assert "Did you mean 'caltech101'?" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_promptkd_sees_all_images_of_all_classes_and_the_teacher_of_its_data_set(root: Path, tmp_path: Path) -> None:
    """Its official runs distil on the whole training part, new classes included, from a teacher trained on the base
    classes of the same data set; few-shot images alone give other numbers.
    """
    teacher = tmp_path / "teacher"
    words = ["--dataset", "dtd", "--protocol", "base_to_new"]
    assert train(root, teacher, *words, "--shots", "2", "--no_evaluate") == 0
    student = ["train", "--method", "promptkd", "--config", "vision_depth=2", "projector_depth=1", "--transductive"]
    student += ["--model", str(root / "clip"), "--data_root", str(root / "DATA"), *words, "--shots", "2"]
    student += ["--teacher", str(root / "clip"), "--teacher_adapter", str(teacher), "--max_steps", "1", "--use_cpu"]
    assert main([*student, "--report_to", "none", "--output_dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["training_images"]["count"] == 9, "no draw of shots"
    assert summary["objective"]["transductive"] is True
    assert summary["objective"]["seen_classes"] == ["banded", "blotchy"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["class_names"] == ["banded", "blotchy", "zigzagged"]
    assert config["template"] == "{} texture."
    assert set(json.loads((tmp_path / "run" / "report.json").read_text())["scores"]) == {"base", "new", "h"}
