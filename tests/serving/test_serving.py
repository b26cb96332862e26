"""The folder `peft_vlm/serving` alone serves an exported classifier."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import save_file

from peft_vlm.classifier import PromptedClassifier
from peft_vlm.data.images import read_image
from peft_vlm.export import plain_classifier, save_onnx
from peft_vlm.serving.card import METADATA_KEY, best_labels
from peft_vlm.serving.onnx import OnnxClassifier
from peft_vlm.serving.plain import load_exported
from peft_vlm.text.class_features import encode_classes
from tests.cases import base_model, class_prompts, perturb, skip_tuning_config
from tests.source_tree import PACKAGE, ROOT
from tests.tiny import clip_processor, colour_names, noise_image, tiny_tokenizer

FORBIDDEN = ("peft_vlm", "peft", "transformers", "datasets", "jaxtyping", "huggingface_hub")


@pytest.fixture(scope="module")
def adapter_model():
    """A tiny CLIP with an adapter that acts."""
    model = get_peft_model(base_model(), skip_tuning_config())
    perturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def folder(adapter_model, tmp_path_factory):
    """Its export as safetensors and ONNX."""
    folder = tmp_path_factory.mktemp("exported")
    features = encode_classes(adapter_model, class_prompts())
    classifier = plain_classifier(adapter_model, features, colour_names(), image_processor=clip_processor())
    classifier.save(folder / "classifier.safetensors")
    save_onnx(classifier, folder / "classifier.onnx")
    return folder


def pictures() -> list[Image.Image]:
    """Images of several modes; the one with four channels is partly transparent."""
    return [noise_image(21, 30, mode=mode) for mode in ("RGB", "L", "P", "RGBA", "CMYK", "I;16")]


def test_labels_are_those_of_the_prompted_classifier(adapter_model, folder) -> None:
    """From image to label: preprocessing, tower, probabilities."""
    reference = PromptedClassifier(
        adapter_model, tiny_tokenizer(), clip_processor(), class_names=colour_names(), template="a {}."
    )
    expected = reference.predict(pictures(), top_k=3)
    for classifier in (load_exported(folder / "classifier.safetensors"), OnnxClassifier(folder / "classifier.onnx")):
        rows = classifier.predict(pictures(), top_k=3)
        assert len(rows) == 6
        for row, wanted in zip(rows, expected, strict=True):
            assert [label for label, _ in row] == [prediction.label for prediction in wanted]
            assert [p for _, p in row] == pytest.approx([prediction.probability for prediction in wanted], abs=1e-5)


def test_paths_bytes_and_sideways_photos_are_read_alike(folder, tmp_path) -> None:
    """An orientation that is not applied turns every phone photo."""
    preprocessing = load_exported(folder / "classifier.safetensors").card.preprocessing
    picture, exif = noise_image(20, 30), Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    picture.save(content, "PNG", exif=exif)
    (tmp_path / "sideways.png").write_bytes(content.getvalue())
    upright = preprocessing(read_image(content.getvalue()))
    assert np.array_equal(preprocessing(content.getvalue()), upright)
    assert np.array_equal(preprocessing(tmp_path / "sideways.png"), upright)
    assert not np.array_equal(preprocessing(picture), upright)


def test_the_folder_runs_without_peft_and_transformers(folder, tmp_path) -> None:
    """What the page says: copy the folder to a server that has none of them."""
    shutil.copytree(ROOT / PACKAGE / "serving", tmp_path / "serving")
    noise_image(20, 20).save(tmp_path / "a picture.png")
    program = f"""
import json, sys
sys.modules.update(dict.fromkeys({FORBIDDEN!r}))
from serving.onnx import OnnxClassifier
without_torch = "torch" not in sys.modules
onnx = OnnxClassifier({str(folder / "classifier.onnx")!r}, threads=1).predict(["a picture.png"], top_k=2)
from serving.plain import load_exported
plain = load_exported({str(folder / "classifier.safetensors")!r}).predict(["a picture.png"], top_k=2)
print(json.dumps([without_torch, onnx, plain]))
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    without_torch, onnx, plain = json.loads(run.stdout)
    assert without_torch
    assert [label for label, _ in onnx[0]] == [label for label, _ in plain[0]]


def test_other_files_are_refused(folder, tmp_path) -> None:
    """A safetensors file of another kind, and one of a newer release."""
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="that `peft-vlm export` wrote"):
        load_exported(tmp_path / "other.safetensors")
    card = json.loads(load_exported(folder / "classifier.safetensors").card.to_json())
    metadata = {METADATA_KEY: json.dumps(card | {"format_version": 99})}
    save_file({"x": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="format version 99, this release reads 1"):
        load_exported(tmp_path / "newer.safetensors")


def test_best_labels() -> None:
    """By hand: softmax of (0, log 3) is (1/4, 3/4)."""
    rows = best_labels(np.array([[0.0, np.log(3.0)]]), ["a", "b"], 5)
    assert [label for label, _ in rows[0]] == ["b", "a"]
    assert [p for _, p in rows[0]] == pytest.approx([0.75, 0.25])
    with pytest.raises(ValueError, match="`top_k` of at least 1, got 0"):
        best_labels(np.zeros((1, 2)), ["a", "b"], 0)
