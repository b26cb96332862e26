"""`peft-vlm train`: any method, from flags or a file."""

import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPProcessor

from peft_vlm import CoOpConfig, VLMTrainingArguments
from peft_vlm.cli import main
from peft_vlm.cli.command import as_flags
from peft_vlm.errors import PeftVLMError, PeftVLMWarning
from peft_vlm.experiments.run import RunSettings, build, named_values, preset_of
from peft_vlm.registry import METHODS, RunSize
from tests.tiny import clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer
from tests.tiny_questions import llava_processor, tiny_llava

#: Words that each method needs on a CLIP of three layers.
WORDS = {
    "atprompt": ["--config", 'attributes=["a"]', "num_text_tokens=1", "num_attribute_tokens=[1]"],
    "bayesian": ["--config", "context_init=null", "num_samples=2"],
    "clip_lora": ["--config", "r=4"],
    "cocoop": ["--config", "context_init=null"],
    "coop": ["--config", "context_init=a"],
    "cpl": ["--config", "context_init=null"],
    "kgcoop": ["--config", "context_init=a"],
    "maple": ["--config", "depth=2", "context_init=null"],
    "pre": ["--config", "num_text_tokens=2"],
    "promptkd": ["--config", "vision_depth=2", "projector_depth=1", "--teacher", "TEACHER", "--transductive"],
    "promptsrc": ["--config", "text_depth=2", "vision_depth=2", "num_text_tokens=2", "context_init=null"],
    "rpp": [
        "--config",
        "text_depth=2",
        "vision_depth=2",
        "num_text_tokens=2",
        "context_init=null",
        "--teacher",
        "TEACHER",
    ],
    "skip_tuning": ["--config", "start_layer=1", "--objective", "batch_composition=random"],
    "tvp": ["--config", "canvas_size=16", "border=3", "--objective", "tse_weight=0"],
}


def save_clip(folder, **settings) -> str:
    """A tiny CLIP with its processor on disk."""
    tiny_clip(**settings).save_pretrained(folder)
    CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of a run of one step on four classes, without method and folder."""
    root = tmp_path_factory.mktemp("r\u00e9sum\u00e9 of colours")
    for seed, split in enumerate(("train", "test")):
        for number, row in enumerate(colour_rows(2, classes=4, seed=seed)):
            path = root / "data" / split / colour_names(4)[row["label"]] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    model = save_clip(root / "clip")
    save_clip(root / "teacher", seed=5, dim=24)
    flags = ["--model", model, "--dataset", str(root / "data"), "--template", "a {}.", "--max_steps", "1"]
    return root, [*flags, "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "4"]


def own_words(method, root) -> list[str]:
    """The words of a method, with the teacher's folder."""
    return [str(root / "teacher") if word == "TEACHER" else word for word in WORDS[method]]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_trained_by_its_name(method, words, tmp_path, capsys) -> None:
    """A method that is not registered with an objective, or needs what no flag gives, fails here."""
    root, flags = words
    flags = [*flags, *own_words(method, root), "--no_evaluate", "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--method", method, *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == {}
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    name = "peft_vlm.json" if method == "clip_lora" else "adapter_config.json"
    config = json.loads((tmp_path / "run" / name).read_text())
    assert config["class_names"] == sorted(colour_names(4))


def test_kgcoop_writes_an_ordinary_coop_adapter(words, tmp_path, capsys) -> None:
    """An adapter type of its own would be one more kind of file for the same tensors."""
    root, flags = words
    run = tmp_path / "run"
    command = ["train", "--method", "kgcoop", *own_words("kgcoop", root), "--objective", "weight=2", *flags, "--json"]
    assert main([*command, "--output_dir", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]
    assert type(PeftConfig.from_pretrained(run)) is CoOpConfig
    names = [name for name in load_file(run / "adapter_model.safetensors")]
    assert names == ["base_model.model.text_model.embeddings.token_embedding.coop_prompt"]
    picture = str(next((root / "data" / "test").rglob("*.png")))
    assert main(["predict", str(run), picture, "--top_k", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["labels"]) == 4
    assert json.loads((run / "training_summary.json").read_text())["objective"]["weight"] == 2


def test_a_setting_of_another_kind_is_a_line_not_a_traceback(words, tmp_path, capsys) -> None:
    """`attributes=color` is text where a list belongs; a TypeError would end the command with thirty lines of code."""
    root, flags = words
    for method, word in (("atprompt", "attributes=color"), ("coop", "num_text_tokens=two")):
        assert (
            main(["train", "--method", method, "--config", word, *flags, "--output_dir", str(tmp_path / "run")]) == 2
        )
        assert word.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_contexts_per_class_know_their_classes_only(words, tmp_path, capsys) -> None:
    """Official `CSC` from flags alone: other names are refused, in use and before a training that would test them."""
    root, flags = words
    run = tmp_path / "run"
    command = ["train", "--method", "coop", "--config", "class_specific=true", "num_text_tokens=2", *flags, "--json"]
    assert main([*command, "--output_dir", str(run)]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    (context,) = load_file(run / "adapter_model.safetensors").values()
    assert context.shape[:2] == (4, 2)
    picture = str(next((root / "data" / "test").rglob("*.png")))
    assert main(["predict", str(run), picture, "--class_names", "quite", "new"]) == 2
    assert "nothing to say about new classes" in capsys.readouterr().err
    data = ["--protocol", "few-shot", "--dataset", str(root / "data"), "--device", "cpu", "--no_plots", "--json"]
    assert main(["evaluate", "--adapter", str(run), *data, "--output_dir", str(tmp_path / "report")]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] == scores["accuracy"]
    assert main(["train", *command[1:], "--protocol", "base_to_new", "--output_dir", str(tmp_path / "new")]) == 2
    assert "Expected `--protocol few_shot` with `class_specific=true`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["promptsrc", "rpp"])
def test_a_seed_also_gives_the_first_values_of_the_adapter(method, words, tmp_path) -> None:
    """Random vectors that are drawn before the seed is set make two equal commands end differently."""
    root, common = words
    settings = [word.replace("TEACHER", str(root / "teacher")) for word in WORDS[method]]
    states = []
    for number, seed in enumerate(("1", "1", "2")):
        folder = tmp_path / str(number)
        assert (
            main(["train", "--method", method, *settings, *common, "--seed", seed, "--output_dir", str(folder)]) == 0
        )
        states.append(load_file(folder / "adapter_model.safetensors"))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_a_run_shows_how_far_it_is(words, tmp_path, capsys) -> None:
    """A terminal that stays empty looks like a program that hangs; one that is full of bars and dictionaries, like one
    that nobody is meant to read. Scripts read standard output."""
    root, flags = words
    flags = [*flags[:6], "--num_train_epochs", "2", "--use_cpu", "--report_to", "none"]
    flags += ["--eval_split", "test", "--eval_strategy", "epoch", "--logging_steps", "1"]
    flags += ["--per_device_train_batch_size", "4"]
    command = ["train", "--method", "coop", *own_words("coop", root), *flags, "--output_dir", str(tmp_path / "run")]
    assert main(command) == 0
    captured = capsys.readouterr()
    progress = captured.err
    for expected in ("Epoch 1 of 2: loss", "Epoch 2 of 2: loss", "4/4", ", loss ", "validation: accuracy "):
        assert expected in progress, expected
    assert "{" not in captured.out + progress, "a dictionary of transformers"
    assert "Loading weights" not in progress
    assert progress.count("Epoch") == progress.count("validation:") == 2
    assert main([*command[:-1], str(tmp_path / "again"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "Epoch" not in captured.err
    assert set(json.loads(captured.out)["scores"]) == {"accuracy", "zero_shot_accuracy"}
    assert main([*command[:-1], str(tmp_path / "quiet"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Written to" in captured.out
    assert logging.getLogger("peft_vlm").isEnabledFor(logging.WARNING)  # as before the command
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--quiet", "--verbose"])


@pytest.mark.plots
def test_the_card_is_rendered_again_after_each_evaluation(words, tmp_path, capsys) -> None:
    """The first card said "Not evaluated." for good, `num_train_epochs` 3.0 of ten epochs, and its place."""
    root, flags = words
    run = tmp_path / "run"
    assert main(["train", "--method", "coop", *own_words("coop", root), *flags, "--output_dir", str(run)]) == 0
    card = (run / "README.md").read_text()
    scores = json.loads((run / "report.json").read_text())["scores"]
    assert f"| accuracy | {scores['accuracy']:.2f} |" in card
    assert "zero-shot % | gain |" in card
    assert "training_curve.png" in card
    shown = sorted(path.name for path in run.glob("*_*.png") if path.name.startswith(("confusion", "reliability")))
    assert len(shown) == 2
    assert all(f"]({name})" in card for name in shown)
    assert "num_train_epochs" not in card
    assert "1 steps in" in card
    assert str(tmp_path) not in card
    assert str(root) not in card
    evaluate = ["evaluate", "--protocol", "few-shot", "--adapter", str(run), "--output_dir", str(run), "--no_plots"]
    assert main([*evaluate, "--dataset", str(root / "data"), "--note", "a second look"]) == 0
    assert "a second look" in (run / "README.md").read_text()


def test_a_checkpoint_chosen_on_the_test_images_is_said_so(words, tmp_path, capsys) -> None:
    """The best of many checkpoints on the test images was published as the accuracy on new ones."""
    root, flags = words
    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "validation")
    shutil.copytree(root / "data" / "test", tmp_path / "data" / "test")  # the same images under another name
    choice = ["--eval_strategy", "steps", "--save_strategy", "steps", "--save_steps", "1", "--eval_steps", "1"]
    command = ["train", "--method", "coop", *own_words("coop", root), *flags, *choice, "--load_best_model_at_end"]
    for name in ("test", "validation"):
        run = tmp_path / name
        own = ["--dataset", str(tmp_path / "data"), "--eval_split", name, "--output_dir", str(run)]
        with pytest.warns(PeftVLMWarning, match="chosen on the test images"):
            assert main([*command, *own]) == 0
        assert json.loads((run / "report.json").read_text())["selected_on_test"] is True
        assert json.loads((run / "zero_shot.json").read_text())["selected_on_test"] is False
        assert "The checkpoint was chosen on these test images" in (run / "README.md").read_text()
    evaluate = ["evaluate", "--protocol", "few-shot", "--adapter", str(run), "--output_dir", str(tmp_path / "other")]
    assert main([*evaluate, "--dataset", str(root / "data"), "--no_plots"]) == 0
    assert json.loads((tmp_path / "other" / "report.json").read_text())["selected_on_test"] is True


def test_features_that_are_stored_in_every_epoch_show_one_bar(words, tmp_path, capsys) -> None:
    """A second bar in every epoch stood between the lines of the run."""
    root, flags = words
    flags = [*flags[:6], "--num_train_epochs", "3", "--use_cpu", "--report_to", "none", "--no_evaluate"]
    command = ["train", "--method", "skip_tuning", *flags, "--objective", "image_cache=ram", "cache_batch_size=2"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    progress = capsys.readouterr().err
    assert "Storing" in progress
    assert "Storing" not in progress.partition("Epoch 1 of 3")[2]


def test_a_folder_without_parts_is_parted_and_said_so(words, tmp_path, capsys, caplog) -> None:
    """A newcomer's flat folder of classes ended in an error about a split that it does not have."""
    root, flags = words
    flat = tmp_path / "flat"
    for split in ("train", "test"):
        for path in (root / "data" / split).rglob("*.png"):
            target = flat / path.parent.name / f"{split} {path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    flags = [*flags, *own_words("coop", root), "--dataset", str(flat), "--holdout", "0.25"]
    run = tmp_path / "run"
    assert main(["train", "--method", "coop", *flags, "--output_dir", str(run)]) == 0
    assert "flat has no parts: 12 images are `train`, and 4, 25 % of each class" in caplog.text
    data = json.loads((run / "training_summary.json").read_text())["data"]
    assert data == {"num_images": 12, "num_classes": 4, "holdout": 0.25, "holdout_seed": 0}
    report = json.loads((run / "report.json").read_text())
    assert report["parts"]["all"]["num_images"] == 4
    assert "25% of each class" in report["note"]
    assert "25% of each class, drawn by seed 0, were kept for the test" in (run / "README.md").read_text()
    evaluate = ["evaluate", "--protocol", "few-shot", "--adapter", str(run), "--dataset", str(flat), "--no_plots"]
    assert main([*evaluate, "--output_dir", str(tmp_path / "again"), "--save_predictions"]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["parts"] == report["parts"], "the same images"
    text = (tmp_path / "again" / "predictions.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 4
    for row in rows:
        assert Path(row["file"]).is_file()
        assert Path(row["file"]).parent.name == row["label"]
    assert main(["train", "--method", "coop", *flags, "--no_evaluate", "--output_dir", str(tmp_path / "all")]) == 0
    data = json.loads((tmp_path / "all" / "training_summary.json").read_text())["data"]
    assert data == {"num_images": 16, "num_classes": 4}, "nothing is kept for a test that is not made"


def test_several_seeds_give_mean_and_spread(words, tmp_path, capsys) -> None:
    """One seed's luck is not a result."""
    root, flags = words
    command = ["train", "--method", "coop", *own_words("coop", root), *flags, "--shots", "1"]
    command += ["--seeds", "1", "2", "--output_dir", str(tmp_path / "runs")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "over 2 seeds" in printed
    result = json.loads((tmp_path / "runs" / "seeds.json").read_text())
    scores = []
    for seed in (1, 2):
        folder = tmp_path / "runs" / f"seed{seed}"
        assert json.loads((folder / "training_summary.json").read_text())["training"]["seed"] == seed
        scores.append(json.loads((folder / "report.json").read_text())["scores"]["accuracy"])
        assert result["seeds"][str(seed)]["accuracy"] == scores[-1]
    assert result["mean"]["accuracy"] == pytest.approx(sum(scores) / 2)
    assert result["std"]["accuracy"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert main([*command, "--seed", "3"]) == 2
    assert "`--seed` or `--seeds`, got both" in capsys.readouterr().err


def test_flags_replace_what_a_file_says_and_the_adapter_is_measured(words, tmp_path, capsys) -> None:
    """Base-to-new: two of four classes are trained on; the base model stands beside the result."""
    root, flags = words
    values = {"method": "skip_tuning", "protocol": "base_to_new", "shots": 1, "seed": 7, "warmup_learning_rate": 1e-06}
    values |= {"config": {"start_layer": 1}, "objective": {"batch_composition": "random", "top_ratio": 1.0}}
    values |= {"model": flags[1], "dataset": flags[3], "template": "- {}.", "max_steps": 1, "use_cpu": True}
    values |= {"memory_check": "warn"}  # of an earlier version
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values | {"output_dir": "not here"}))
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "settings.yaml"), "--seed", "3", "--output_dir", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "zero_shot_new" in printed
    assert "peft-vlm predict" in printed
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["training"]["seed"] == 3
    assert summary["training"]["warmup_learning_rate"] == 1e-6
    assert summary["objective"]["top_ratio"] == 1.0
    assert summary["data"] == {"num_images": 2, "num_classes": 2}
    assert {"base", "new", "h"} <= set(json.loads((run / "report.json").read_text())["scores"])
    assert main(["info", str(run)]) == 0
    assert "results of the base model" in capsys.readouterr().out


def test_a_test_split_of_training_images_is_refused(words, tmp_path, capsys) -> None:
    """75 % "(test)" was the accuracy on the run's own twelve training images."""
    root, flags = words
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        shutil.copytree(root / "data" / "train", tmp_path / "data" / split)
    run = tmp_path / "run"
    flags = ["train", "--method", "coop", *own_words("coop", root), *flags, "--output_dir", str(run)]
    assert main([*flags, "--dataset", str(tmp_path / "data")]) == 2
    assert "of the test images are training images" in capsys.readouterr().err
    assert not (run / "adapter_model.safetensors").exists()
    assert main([*flags, "--no_evaluate"]) == 0
    evaluate = ["evaluate", "--protocol", "few-shot", "--adapter", str(run), "--no_plots"]
    evaluate += ["--output_dir", str(tmp_path / "report"), "--dataset"]
    assert main([*evaluate, str(tmp_path / "data")]) == 2
    assert "of the test images are training images" in capsys.readouterr().err
    assert main([*evaluate, str(root / "data")]) == 0
    assert main([*evaluate, str(tmp_path / "data"), "--split", "train"]) == 0, (
        "an accuracy on training images by its name"
    )


def test_the_range_of_deep_images_goes_with_the_adapter(words, tmp_path, capsys) -> None:
    """Prediction and export would show the model nearly black images."""
    root, flags = words
    for seed, split in enumerate(("train", "test")):
        for number, row in enumerate(colour_rows(2, classes=2, seed=seed)):
            path = tmp_path / "data" / split / colour_names(2)[row["label"]] / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(row["image"].convert("L")).astype(np.uint16) * 16).save(path)
    run = tmp_path / "run"
    command = ["train", "--method", "coop", *own_words("coop", root), *flags, "--dataset", str(tmp_path / "data")]
    command += ["--output_dir", str(run)]
    assert main([*command, "--value_range", "0", "400", "--no_evaluate", "--max_steps", "1"]) == 2
    capsys.readouterr()
    assert main(command) == 2
    assert "Pass `--value_range 0 4095`" in capsys.readouterr().err
    assert main([*command, "--value_range", "0", "4095"]) == 0
    assert json.loads((run / "adapter_config.json").read_text())["value_range"] == [0, 4095]
    capsys.readouterr()
    deep, plain = (tmp_path / "data/test" / colour_names(2)[0] / name for name in ("0.tif", "0.png"))
    Image.fromarray((np.asarray(Image.open(deep)) // 16).astype(np.uint8)).save(plain)
    assert main(["export", str(run), str(tmp_path / "out"), "--formats", "safetensors"]) == 0
    capsys.readouterr()
    for classifier in (run, tmp_path / "out" / "classifier.safetensors"):
        assert main(["predict", str(classifier), str(deep), str(plain), "--json"]) == 0
        first, second = (row["labels"] for row in json.loads(capsys.readouterr().out))
        assert first[0]["label"] == second[0]["label"]
        assert first[0]["probability"] == pytest.approx(second[0]["probability"], abs=1e-3)


def test_models_that_write_text_are_asked_a_question(words, tmp_path, capsys) -> None:
    """The class names are the candidate answers."""
    _, flags = words
    tiny_llava().save_pretrained(tmp_path / "llava")
    llava_processor().save_pretrained(tmp_path / "llava")
    flags = [*flags[2:], "--model", str(tmp_path / "llava"), "--question", "which colour?"]
    flags += ["--output_dir", str(tmp_path / "run")]
    assert main(["train", "--method", "tvp", *flags, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["scores"]["accuracy"] <= 100
    assert main(["train", "--method", "coop", *flags]) == 2
    assert "'coop' is not trained on models like" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "dpl"], "got 'dpl'"),
        (["--method", "coop", "--preset", "nothing"], "got 'nothing'"),
        (["--method", "atprompt", "--preset", "nothing"], "Expected `--preset` to be one of ('imagenet'"),
        (["--method", "coop", "--shots", "-1"], "Expected `--shots` of 0 or more, got -1"),
        (["--method", "coop", "--seeds", "-1", "2"], "Expected `--seeds` of 0 or more, got -1"),
        (["--method", "coop", "--config", "depth=3"], "`--config` has no setting depth. It has: num_text_tokens"),
        (["--method", "coop", "--config", "depth"], "as name=value, got 'depth'"),
        (["--method", "promptkd"], "needs teacher: pass `--teacher`"),
        (["--method", "coop", "--transductive"], "no use for `--transductive`"),
        (["--method", "coop", "--test_split", "dev"], "'dev'"),
        (["--method", "coop", "--protocol", "open"], "got 'open'"),
        (["--method", "coop", "--model", "no/such folder"], "'no/such folder' does not exist (looked in"),
        (["--method", "kgcoop", "--objective", "weight=much"], "`weight` of `--objective` to be of type float | int"),
        (["--method", "kgcoop", "--objective", "anchor_prompts=a {}"], "of type ClassPrompts | None, got 'a {}'"),
        (
            ["--method", "cpl", "--objective", "nearest=5"],
            "`nearest` of `--objective` to be of type Mapping[str, str]",
        ),
        (["--method", "bayesian", "--objective", "kl_weight=[1]"], "to be of type float | int, got [1]"),
        (["--method", "coop", "--objective", "num_workers=1.5"], "to be of type int, got 1.5"),
        (["--method", "coop", "--augmentation", "scale=0.5"], "`scale` of `--augmentation` to be of type tuple[float"),
        (["--method", "skip_tunin"], "Did you mean 'skip_tuning'?"),
        (
            ["--method", "promptkd", "--protocol", "base_to_new", "--shots", "1"],
            "its adapter stores a vector per class and knows no new ones",
        ),
        (["--method", "coop", "--model", "no/such folder", "--config", "num_text_token=3"], "mean num_text_tokens?"),
        (["--method", "coop", "--model", "no/such folder", "--template", "a photo"], "`{}` exactly once"),
        (
            ["--method", "coop", "--model", "no/such folder", "--learning_rate", "-1", "--warmup_epochs", "-1"],
            "got -1",
        ),
    ],
)
def test_wrong_settings_end_with_two_before_anything_is_trained(changes, message, words, tmp_path, capsys) -> None:
    """One line that names the setting."""
    _, flags = words
    assert main(["train", *flags, *changes, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_wrong_files_are_named(tmp_path, capsys) -> None:
    """Missing, no mapping, unknown names."""
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- a\n")
    assert main(["train", str(tmp_path / "list.yaml")]) == 2
    assert "got list" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("method: coop\nmodel: m\ndataset: d\noutput_dir: o\nno_such_setting: 1\n")
    assert main(["train", str(tmp_path / "odd.yaml")]) == 2
    assert "no_such_setting" in capsys.readouterr().err
    (tmp_path / "odd.yaml").write_text("method: coop\nmodel: m\ndataset: d\n")
    assert main(["train", str(tmp_path / "odd.yaml")]) == 2
    assert "Expected `--output_dir`" in capsys.readouterr().err


def test_presets_are_the_methods_own() -> None:
    """Each method's official configuration by its name; the command line passes the number of shots."""
    names = {"coop": "random", "promptkd": "base_to_new", "promptsrc": "base_to_new", "skip_tuning": "few_shot"}
    names |= {"clip_lora": "few_shot", "maple": "base_to_new", "cocoop": "base_to_new", "pre": "base_to_new"}
    names |= {"atprompt": "eurosat", "kgcoop": "base_to_new", "tvp": "cifar10", "rpp": "imagenet21k"}
    names |= {"bayesian": "base_to_new", "cpl": "base_to_new"}
    for method in METHODS:
        if METHODS[method].preset_for is not None:
            size = RunSize(num_images=4, num_classes=4, fewest=1, is_small=False)
            preset = preset_of(RunSettings(method=method, model="m", dataset="d", preset=names[method]), size)
            assert preset.training
            assert METHODS[method].presets, "which `peft-vlm info` lists"
            assert names[method] in METHODS[method].presets
            assert VLMTrainingArguments(output_dir="unused", use_cpu=True, **preset.training).learning_rate > 0


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("protocol", ["few_shot", "base_to_new"])
@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("per_class", [1, 16, 1000])
def test_what_a_method_recommends_can_be_trained(method, protocol, is_small, per_class) -> None:
    """A rate of 0.002 for every method was 400 times Skip Tuning's; 200 epochs of 1,000 images per class never end."""
    size = RunSize(protocol=protocol, num_images=5 * per_class, num_classes=5, fewest=per_class, is_small=is_small)
    recommended = METHODS[method].recommended
    assert recommended is not None, "a method whose rate is that of all others"
    preset = recommended(size)
    args = VLMTrainingArguments(output_dir="unused", use_cpu=True, **preset.training)
    assert args.warmup_epochs < args.num_train_epochs or args.max_steps > 0
    images_seen = args.num_train_epochs * size.num_images
    if is_small:
        assert 3 <= args.num_train_epochs <= 50
    elif args.max_steps < 0:
        assert images_seen <= 200 * 16 * 5 + size.num_images
        at_16 = recommended(RunSize(**{**vars(size), "num_images": 80, "fewest": 16}))
        assert args.num_train_epochs <= at_16.training["num_train_epochs"]
    assert isinstance(METHODS[method].adapter_type.config(**{**METHODS[method].defaults, **preset.config}), PeftConfig)
    official = {"skip_tuning": {1e-5, 2e-5}, "coop": {2e-3}, "promptsrc": {2.5e-3}, "clip_lora": {2e-4}}
    if not is_small and method in official:
        assert args.learning_rate in official[method]


def test_a_run_without_settings_uses_and_prints_what_its_method_recommends(words, tmp_path, capsys) -> None:
    """Flags win, what is recommended beside them is said; a given length takes the recommended warm-up away."""
    root, flags = words
    flags = [*flags[:6], "--use_cpu", "--report_to", "none", "--no_evaluate", "--objective", "top_ratio=1.0"]
    command = ["train", "--method", "skip_tuning", *flags, "--num_train_epochs", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "Recommended for skip_tuning on a small model" in said
    assert "learning_rate=0.02" in said
    assert "num_train_epochs=" not in said, "it was given"
    assert "settings fit it" in said or "`start_layer`" not in said
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["training"]["learning_rate"] == 0.02
    assert summary["training"]["per_device_train_batch_size"] == 32
    assert summary["objective"]["batch_composition"] == "random"
    assert summary["objective"]["top_ratio"] == 1.0
    assert summary["data"]["num_images"] == 8, "all images, not 16 per class"
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["start_layer"] == 1, "of three layers"
    assert main([*command, "--learning_rate", "0.1", "--output_dir", str(tmp_path / "other")]) == 0
    assert "learning_rate" not in capsys.readouterr().err.partition("Training in")[0]
    summary = json.loads((tmp_path / "other" / "training_summary.json").read_text())
    assert summary["training"]["learning_rate"] == 0.1


def test_words_and_values() -> None:
    """Values are JSON where they can be, text elsewhere, in both directions."""
    words = ["depth=3", "init=a photo", "scale=[0.9, 1]", "cache=null", "equation=a=b"]
    values = {"depth": 3, "init": "a photo", "scale": [0.9, 1], "cache": None, "equation": "a=b"}
    assert named_values(words, "config") == values
    flags = as_flags({"config": values, "seed": 1, "split": ["a", "b"], "note": None, "template": "- {}"})
    assert flags == ["--config", *words, "--seed=1", "--split", "a", "b", "--template=- {}"]
    with pytest.raises(PeftVLMError, match="`objective` has no setting x. It has: b."):
        build(lambda a, *, b: b, {"x": 1}, 0, name="objective")
