"""Official Skip Tuning files become adapters that give the recorded outputs."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError
from peft_vlm.models.towers import image_features, similarity_logits, text_features
from tests.conversion.official_files import adapter, official, official_tensors
from tests.parity.recorded import recorded_clip, tensors

NAME = "S3_sgd.flat_1e-3"


def evaluation_logits(folder) -> torch.Tensor:
    """Logits of the recorded evaluation: all images, all texts."""
    model = adapter(folder, clip="tiny_clip")
    with torch.no_grad():
        text = text_features(model, tensors("clip_inputs")["tokens7"])
        return similarity_logits(model, image_features(model, tensors("S3_sgd")["pixel_values"]), text)


def test_the_recorded_logits_come_out_of_the_official_file(skip_folder, tmp_path):
    report = convert(official(NAME), tmp_path / "a", base_model=skip_folder, template="a photo of a {}.")
    assert report.config.start_layer == 2
    assert len(report.used) == 2 * 2 * 12 + 6
    assert len(report.used) + len(report.unused) == len(official_tensors(NAME)) == 109
    assert list(report.missing) == ["logit_scale"]
    assert "first layer that differs" in report.notes[0]
    expected = tensors("S3_sgd")["flat_1e-3.eval_logits"]
    assert_close(evaluation_logits(tmp_path / "a"), expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


def test_half_precision_finds_the_same_layers(skip_folder, tmp_path):
    """Frozen layers are those that equal the base model's in the precision of the file."""
    content = {key: value.half() for key, value in official_tensors(NAME).items()}
    torch.save({"state_dict": content}, tmp_path / "half.pth")
    report = convert(tmp_path / "half.pth", tmp_path / "a", base_model=skip_folder, template="{}")
    assert report.config.start_layer == 2
    assert all("equal to" in why for why in report.unused.values())
    expected = tensors("S3_sgd")["flat_1e-3.eval_logits"]
    assert_close(evaluation_logits(tmp_path / "a"), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_start_layers_are_checked_against_the_file(skip_folder, tmp_path):
    settings = {"base_model": skip_folder, "template": "{}"}
    with pytest.raises(AdapterError, match="`start_layer` of at most 2, the first layer .* got 3"):
        convert(official(NAME), tmp_path / "a", start_layer=3, **settings)
    lower = convert(official(NAME), tmp_path / "lower", start_layer=1, class_names=["x", "y"], **settings)
    assert (lower.config.start_layer, lower.config.class_names) == (1, ["x", "y"])
    assert len(lower.used) == 2 * 3 * 12 + 6
    with pytest.raises(AdapterError, match=r"Missing: `template`, which the file does not hold"):
        convert(official(NAME), tmp_path / "a", base_model=skip_folder)


def test_untuned_and_foreign_files_are_refused(skip_folder, student_folder, tmp_path):
    from peft_vlm.conversion.base_model import official_weights

    weights = official_weights(recorded_clip("tiny_clip"))
    torch.save({k: v for k, v in weights.items() if k != "logit_scale"}, tmp_path / "untuned.pth")
    with pytest.raises(AdapterError, match="No layer of .* differs from the base model"):
        convert(tmp_path / "untuned.pth", tmp_path / "a", base_model=skip_folder, template="{}")
    with pytest.raises(AdapterError, match="was made on another CLIP than"):
        convert(official(NAME), tmp_path / "a", base_model=student_folder, template="{}")
    content = official_tensors(NAME)
    content.pop("text_encoder.ln_final.bias")
    torch.save({"state_dict": content}, tmp_path / "short.pth")
    with pytest.raises(AdapterError, match=r"Expected the tensor 'text_encoder\.ln_final\.bias' in .*short\.pth"):
        convert(tmp_path / "short.pth", tmp_path / "a", base_model=skip_folder, template="{}")
