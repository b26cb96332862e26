"""The example as a user runs it: as a script, in its own process, on a folder model and a folder dataset."""

import json
from pathlib import Path

import pytest
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tests.scripts import Finished, run_script
from tests.tiny import clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer


def write_images(folder: Path, *, per_class: int = 6, classes: int = 4, size: int = 20) -> Path:
    """An image folder with train and test parts."""
    for split, seed in (("train", 0), ("test", 1)):
        for number, row in enumerate(colour_rows(per_class, classes=classes, size=size, seed=seed)):
            path = folder / split / colour_names(classes)[row["label"]] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return folder


def run(*arguments: str) -> Finished:
    return run_script("examples/train_skip_tuning.py", *arguments)


def check(output: Path, *, seeds: list[int], methods: list[str]) -> dict:
    """The report has the promised form; its files are there."""
    report = json.loads((output / "metrics.json").read_text())
    assert report["seeds"] == seeds
    assert list(report["methods"]) == methods
    for name, row in report["methods"].items():
        keys = {"base", "new", "h", "seconds", "peak_memory_mb", "trainable_parameters"}
        assert keys <= set(row), name
        assert len(row["base"]) == len(row["seconds"]) == len(row["peak_memory_mb"]) == len(seeds)
        assert isinstance(row["trainable_parameters"], int)
        if name == "linear_probe":
            assert row["new"] is None
            assert row["h"] is None
        else:
            assert all(0 <= value <= 100 for value in row["new"] + row["h"])
    assert (output / "results.png").stat().st_size > 5_000
    assert "| skip tuning |" in (output / "table.md").read_text()
    return report


def test_a_folder_of_images_from_start_to_finish(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer()).save_pretrained(tmp_path / "clip")
    data, output = write_images(tmp_path / "my images"), tmp_path / "out"
    result = run(
        *("--model", str(tmp_path / "clip"), "--dataset", str(data), "--template", "a {}", "--preset", "base_to_new"),
        *("--shots", "4", "--seeds", "1", "2", "--epochs", "2", "--output_dir", str(output), "--use_cpu"),
        *("--start_layer", "1"),
    )
    assert result.code == 0, result.printed
    check(output, seeds=[1, 2], methods=["zero_shot", "linear_probe", "full_finetuning", "skip_tuning"])
    adapter = output / "my images" / "skip_tuning" / "seed2"
    assert json.loads((adapter / "adapter_config.json").read_text())["class_names"] == sorted(colour_names(4))[:2]
    assert "peft-vlm predict" in result.printed


@pytest.mark.slow
def test_a_vit_b16_from_disk_with_the_official_preset(tmp_path):
    """The path of users with a model hub, on random weights of the real size."""
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    CLIPModel(
        CLIPConfig(text_config=ids, vision_config={**vision, "patch_size": 16}, projection_dim=512)
    ).save_pretrained(tmp_path / "clip")
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tiny_tokenizer()).save_pretrained(tmp_path / "clip")
    data, output = write_images(tmp_path / "data", per_class=4, size=224), tmp_path / "out"
    result = run(
        *("--model", str(tmp_path / "clip"), "--dataset", str(data), "--template", "a photo of a {}.", "--use_cpu"),
        *("--preset", "base_to_new", "--shots", "4", "--seeds", "1", "--epochs", "2", "--output_dir", str(output)),
    )
    assert result.code == 0, result.printed
    report = check(output, seeds=[1], methods=["zero_shot", "linear_probe", "full_finetuning", "skip_tuning"])
    assert report["methods"]["skip_tuning"]["trainable_parameters"] > 60_000_000


def test_a_wrong_dataset_is_named_before_anything_is_trained(tmp_path):
    result = run("--dataset", str(tmp_path / "nothing here"), "--output_dir", str(tmp_path / "out"))
    assert result.code != 0
    assert "nothing here" in result.printed
    assert not (tmp_path / "out" / "metrics.json").exists()
