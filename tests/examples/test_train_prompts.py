"""The examples of CoOp, PromptSRC and PromptKD as a user runs them: a few steps on a part of the bundled sets."""

import json
from pathlib import Path

import pytest

from peft_vlm import PromptedClassifier
from peft_vlm.data.loading import load_image_dataset
from tests.scripts import Finished, run_script
from tests.source_tree import ROOT

CLASSES, SHOTS = 4, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An image folder with a few images of the first classes of the bundled icons."""
    folder = tmp_path_factory.mktemp("data") / "few icons"
    for split in ("train", "test"):
        dataset = load_image_dataset(str(ROOT / "examples/assets/icons"), split=split)
        for label in range(CLASSES):
            positions = [i for i, other in enumerate(dataset.labels) if other == label][: SHOTS + 1]
            for position in positions:
                path = folder / split / dataset.class_names[label] / f"{position}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                dataset.image(position).save(path)
    return folder


def run(script: str, *arguments: str) -> Finished:
    return run_script(f"examples/{script}", "--use_cpu", *arguments)


def test_the_terminal_shows_one_bar_and_the_results(data, tmp_path):
    """Bars of libraries for every table and every model once filled the screen; `--quiet` leaves the results."""
    own = ["--dataset", str(data), "--shots", "1", "--seeds", "1", "--epochs", "2", "--protocol", "few_shot"]
    shown = run("train_coop.py", *own, "--output_dir", str(tmp_path / "shown"))
    assert shown.code == 0, shown.printed
    assert "3/3" in shown.printed
    for noise in ("Generating", "Loading weights", "Map:", "Image features", "Storing"):
        assert noise not in shown.printed
    quiet = run("train_coop.py", *own, "--quiet", "--output_dir", str(tmp_path / "quiet"))
    assert quiet.code == 0, quiet.printed
    assert quiet.printed.lstrip().startswith("### few icons, 1 seed")
    assert len(quiet.printed.splitlines()) < 20


def check(output: Path, methods: list[str], scores: set[str]) -> dict:
    """The report has the promised form; its files are there."""
    report = json.loads((output / "metrics.json").read_text())
    assert list(report["methods"]) == methods
    for row in report["methods"].values():
        assert scores | {"seconds", "peak_memory_mb", "trainable_parameters"} <= set(row)
        assert all(0 <= value <= 100 for score in scores for value in row[score])
    assert (output / "results.png").stat().st_size > 5_000
    assert f"| {methods[-1].replace('_', ' ')} " in (output / "table.md").read_text()
    return report


def test_promptsrc_from_start_to_finish(data, tmp_path):
    result = run(
        "train_promptsrc.py",
        *("--dataset", str(data), "--shots", str(SHOTS), "--seeds", "1", "--epochs", "2"),
        *("--output_dir", str(tmp_path)),
    )
    assert result.code == 0, result.printed
    report = check(tmp_path, ["zero_shot", "ivlp", "promptsrc"], {"base", "new", "h"})
    # 4 text tokens in 3 layers of width 192 or 2 vision tokens in 4 layers; the same for both rows
    assert report["methods"]["ivlp"]["trainable_parameters"] == report["methods"]["promptsrc"]["trainable_parameters"]
    folder = tmp_path / "few icons" / "promptsrc" / "seed1"
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["metrics"]["aggregated_epochs"] == 2
    assert summary["objective"]["text_weight"] == 25.0
    assert len(summary["objective"]["frozen_templates"]) == 5
    picture = next(path for path in sorted(data.rglob("*.png")))
    predictions = PromptedClassifier.from_pretrained(folder).predict(str(picture))
    assert {p.label for p in predictions} == set(
        json.loads((folder / "adapter_config.json").read_text())["class_names"]
    )


def test_promptsrc_refuses_a_depth_that_the_model_does_not_have(data, tmp_path):
    """The official depth 9 does not fit the bundled model of 4 text layers."""
    result = run(
        "train_promptsrc.py", "--dataset", str(data), "--preset", "base_to_new", "--output_dir", str(tmp_path)
    )
    assert result.code != 0
    assert "Expected `text_depth` from 0 to 4" in result.printed


def test_coop_from_start_to_finish(data, tmp_path):
    result = run(
        "train_coop.py",
        *("--dataset", str(data), "--shots", str(SHOTS), "--seeds", "1", "--epochs", "2"),
        *("--preset", "random", "--template", "{}.", "--class_position", "middle", "--output_dir", str(tmp_path)),
    )
    assert result.code == 0, result.printed
    report = check(tmp_path, ["zero_shot", "coop", "kgcoop"], {"accuracy"})
    summary = json.loads((tmp_path / "few icons" / "kgcoop" / "seed1" / "training_summary.json").read_text())
    assert summary["objective"]["weight"] == 8
    config = json.loads((tmp_path / "few icons" / "coop" / "seed1" / "adapter_config.json").read_text())
    assert config["num_text_tokens"] == 16
    assert config["class_position"] == "middle"
    assert report["methods"]["coop"]["trainable_parameters"] % 16 == 0


def test_promptkd_trains_teacher_and_student(data, tmp_path):
    """Both stages, and an adapter that classifies with the teacher's class vectors."""
    result = run(
        "train_promptkd.py",
        *("--dataset", str(data), "--shots", str(SHOTS), "--seeds", "1", "--epochs", "2"),
        *("--align_steps", "20", "--output_dir", str(tmp_path)),
    )
    assert result.code == 0, result.printed
    rows = ["student_zero_shot", "student_promptsrc", "teacher_zero_shot", "teacher_promptsrc"]
    report = check(tmp_path, [*rows, "student_projector_only", "student_promptkd"], {"base", "new", "h"})
    assert report["methods"]["teacher_zero_shot"]["trainable_parameters"] == 0
    folder = tmp_path / "few icons" / "student_promptkd" / "seed1"
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["objective"]["transductive"] is True
    assert summary["objective"]["align_steps"] == 20
    assert summary["objective"]["training_images"]["images"] == CLASSES * (SHOTS + 1)
    assert {"agreement_seen", "agreement_unseen"} & set(summary["metrics"])
    picture = next(path for path in sorted(data.rglob("*.png")))
    predictions = PromptedClassifier.from_pretrained(folder).predict(str(picture))
    assert len(predictions) == CLASSES


def test_maple_is_trained_and_folded(data, tmp_path):
    result = run(
        "train_maple.py",
        *("--dataset", str(data), "--shots", str(SHOTS), "--seeds", "1", "--epochs", "2"),
        *("--output_dir", str(tmp_path)),
    )
    assert result.code == 0, result.printed
    check(tmp_path, ["zero_shot", "maple"], {"base", "new", "h"})
    picture = str(next(path for path in sorted(data.rglob("*.png"))))
    folders = [tmp_path / "few icons" / "maple" / "seed1", tmp_path / "folded"]
    scores = [PromptedClassifier.from_pretrained(folder).predict(picture) for folder in folders]
    assert [p.label for p in scores[0]] == [p.label for p in scores[1]]
    assert scores[0][0].probability == pytest.approx(scores[1][0].probability, abs=1e-5)


def test_cocoop_is_trained_beside_coop(data, tmp_path):
    result = run(
        "train_cocoop.py",
        *("--dataset", str(data), "--shots", str(SHOTS), "--seeds", "1", "--epochs", "1"),
        *("--output_dir", str(tmp_path)),
    )
    assert result.code == 0, result.printed
    check(tmp_path, ["zero_shot", "coop", "cocoop"], {"base", "new", "h"})
    picture = str(next(path for path in sorted(data.rglob("*.png"))))
    folder = tmp_path / "few icons" / "cocoop" / "seed1"
    assert len(PromptedClassifier.from_pretrained(folder).predict(picture)) == CLASSES // 2


def test_bayesian_prompts_are_trained_beside_coop(data, tmp_path):
    result = run(
        "train_bayesian.py",
        *("--dataset", str(data), "--shots", str(SHOTS), "--seeds", "1", "--epochs", "1", "--conditional"),
        *("--output_dir", str(tmp_path)),
    )
    assert result.code == 0, result.printed
    check(tmp_path, ["zero_shot", "coop", "bayesian"], {"base", "new", "h"})
    picture = str(next(path for path in sorted(data.rglob("*.png"))))
    folder = tmp_path / "few icons" / "bayesian" / "seed1"
    scores = [PromptedClassifier.from_pretrained(folder).predict(picture) for _ in range(2)]
    assert len(scores[0]) == CLASSES // 2
    assert scores[0] == scores[1], "a published adapter gives everybody the same numbers"
