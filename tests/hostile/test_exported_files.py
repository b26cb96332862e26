"""Exported classifiers of strangers: sizes are compared with the file before anything is built."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_vlm.errors import ExportedFileError
from peft_vlm.export import plain_classifier, save_onnx
from peft_vlm.serving.card import METADATA_KEY, ClassifierCard
from peft_vlm.serving.onnx import OnnxClassifier
from peft_vlm.serving.plain import load_exported
from peft_vlm.text.class_features import encode_classes
from tests.cases import base_model, class_prompts
from tests.hostile.attack import Attack, outcomes, table
from tests.tiny import clip_processor, colour_names, noise_image

NAME = "classifier.safetensors"
BIG = 10**7


def rewritten(folder, card, edit=lambda tensors: None) -> None:
    """Write the file again with another card, or other tensors."""
    with safe_open(folder / NAME, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = file.metadata()[METADATA_KEY]
    edit(tensors)
    text = card if isinstance(card, str) else json.dumps(json.loads(text) | card(json.loads(text)))
    save_file(tensors, folder / NAME, metadata={METADATA_KEY: text})


def card(**values):
    """Replace values of the card."""
    return lambda folder: rewritten(folder, lambda old: values)


def part(name, **values):
    """Replace values of a part of the card; `...` takes one out."""

    def changed(old):
        new = old[name] | values
        return {name: {key: value for key, value in new.items() if value is not ...}}

    return lambda folder: rewritten(folder, changed)


def text(content):
    """Replace the card."""
    return lambda folder: rewritten(folder, content)


def tensors(edit):
    """Change the tensors."""
    return lambda folder: rewritten(folder, lambda old: {}, edit)


def content(data):
    """Replace the file."""
    return lambda folder: (folder / NAME).write_bytes(data) and None


def refused(name, make, message):
    """A row of the table."""
    return Attack(name, make, message, ExportedFileError)


ATTACKS = table(
    refused("empty", content(b""), "Expected a complete safetensors file"),
    refused("cut", content((1000).to_bytes(8, "little") + b"{"), "Expected a complete safetensors file"),
    refused("a-folder", lambda f: ((f / NAME).unlink(), (f / NAME).mkdir()), "Expected a file"),
    refused("a-pipe", lambda f: ((f / NAME).unlink(), os.mkfifo(f / NAME)), "Expected a file"),
    refused("no-json", text("{"), "Expected JSON"),
    refused("deep", text("[" * 100_000), "Expected JSON"),
    refused("a-list", text("[]"), "Expected names and values"),
    refused("null", text("null"), "Expected names and values"),
    refused("nothing-in-it", text("{}"), "`format_version`"),
    refused("newer", card(format_version=99), "has format version 99"),
    refused("version-as-text", card(format_version="1"), "`format_version` as a number"),
    refused("version-true", card(format_version=True), "`format_version` as a number"),
    refused("no-classes", card(class_names=[]), "`class_names`"),
    refused("classes-a-word", card(class_names="cat"), "`class_names`"),
    refused("classes-numbers", card(class_names=[1] * 11), "`class_names`"),
    refused("more-classes", card(class_names=["a"] * BIG), "at most 16,777,216 characters"),
    refused("other-number-of-classes", card(class_names=["a"] * 99), "'class_vectors' of shape (99,"),
    refused("something-more", card(hook="os.system"), "Expected a card with"),
    refused("source-a-list", card(source=[]), "`source` as names"),
    *(
        refused(f"{name}-{number}", part("preprocessing", **{name: value}), f"`{name}` as")
        for number, (name, value) in enumerate(
            (
                ("resize", [BIG]),
                ("resize", []),
                ("resize", [0]),
                ("resize", [-1, 3]),
                ("resize", 32),
                ("resize", [1, 2, 3]),
                ("image_size", [BIG, BIG]),
                ("image_size", [16]),
                ("image_size", [16.0, 16]),
                ("resample", 17),
                ("resample", "3"),
                ("rescale_factor", "1"),
                ("rescale_factor", float("nan")),
                ("image_mean", [0.5]),
                ("image_std", [0.5, 0, 0.5]),
                ("image_std", [0.5, float("inf"), 0.5]),
                ("image_mean", ...),
                ("value_range", [1, 1]),
                ("value_range", [0, float("inf")]),
                ("value_range", "01"),
            )
        )
    ),
    refused("more-preprocessing", part("preprocessing", code="x"), "`preprocessing` with"),
    *(
        refused(f"{name}-of-the-tower-{number}", part("architecture", **{name: value}), message)
        for number, (name, value, message) in enumerate(
            (
                ("layers", BIG, "at most"),
                ("layers", -1, "`layers` as"),
                ("layers", 2, "of shape None"),
                ("layers", "3", "`layers` as"),
                ("width", 10**9, "that make a network"),
                ("width", 10**12, "`width` as"),
                ("width", True, "`width` as"),
                ("mlp", 10**9, "of shape"),
                ("heads", 7, "`heads` that divide"),
                ("heads", 0, "`heads` as"),
                ("positions", 10**9, "that make a network"),
                ("positions", 3, "that make a network"),
                ("dim", 10**9, "that make a network"),
                ("patch_size", [BIG, BIG], "`patch_size` as"),
                ("patch_size", [5000, 5000], "that make a network"),
                ("patch_bias", 1, "`patch_bias` as"),
                ("activation", "exec", "that make a network"),
                ("activation", ["gelu"], "`activation` as"),
                ("eps", float("nan"), "`eps` as"),
                ("eps", ..., "`eps` as"),
                ("tokens", {"input": 10**9}, "that make a network"),
                ("tokens", {"input": -1}, "numbers of tokens by layer"),
                ("tokens", {"x": 1}, "numbers of tokens by layer"),
                ("tokens", [], "`tokens` as"),
                ("slots", {"0": {"q_proj": 10**9}}, "that make a network"),
                ("slots", {"0": {"__class__": 1}}, "numbers of slots by layer"),
                ("slots", {"0": []}, "numbers of slots by layer"),
                ("head", [["Linear", 10**9, 10**9, False]], "that make a network"),
                ("head", [["Linear", 10**30, 10**30, False]], "that make a network"),
                ("head", [["Conv2d", 1, 1, 1]], "that make a network"),
                ("head", [["Linear"]], "that make a network"),
                ("head", [["Linear", "a", 3]], "a layer of `head`"),
                ("head", [["ReLU"]] * 99, "at most 16 layers"),
                ("head", "Linear", "at most 16 layers"),
                ("head", ..., "at most 16 layers"),
                ("pixel_prompt", {"image_size": [16, 16]}, "`clamp` as"),
                (
                    "pixel_prompt",
                    {"image_size": [16, 16], "clamp": False, "window": [0, 0, 10**9, 9]},
                    "a window inside",
                ),
                ("pixel_prompt", {"image_size": [16, 16], "clamp": False, "window": "abcd"}, "a window of"),
                ("pixel_prompt", {"image_size": [8000, 8000], "clamp": False, "window": None}, "that make a network"),
                ("pixel_prompt", "x", "names and values"),
            )
        )
    ),
    refused("nan", tensors(lambda t: t["class_vectors"].fill_(float("nan"))), "finite numbers in 'class_vectors'"),
    refused("infinite-scale", tensors(lambda t: t["scale"].fill_(float("inf"))), "finite numbers in 'scale'"),
    refused(
        "integers", tensors(lambda t: t.update(class_vectors=t["class_vectors"].to(torch.int8))), "in 'class_vectors'"
    ),
    refused("complex", tensors(lambda t: t.update(scale=t["scale"].to(torch.complex64))), "finite numbers in 'scale'"),
    refused("a-tensor-less", tensors(lambda t: t.pop("scale")), "'scale' of shape ()"),
    refused("a-tensor-more", tensors(lambda t: t.update(other=torch.zeros(1))), "'other' of shape None"),
    refused("another-shape", tensors(lambda t: t.update(scale=torch.zeros(1))), "'scale' of shape ()"),
)


def load(folder) -> None:
    """What `predict` does with a file."""
    load_exported(folder / NAME)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound export as safetensors and ONNX."""
    folder, model = tmp_path_factory.mktemp("exported"), base_model()
    classifier = plain_classifier(
        model, encode_classes(model, class_prompts()), colour_names(6), image_processor=clip_processor()
    )
    classifier.save(folder / NAME)
    save_onnx(classifier, folder / "classifier.onnx")
    return folder


@pytest.fixture(scope="module")
def results(sound, tmp_path_factory):
    """What came of each attack."""
    folders = {}
    for name, attack in ATTACKS.items():
        folders[name] = tmp_path_factory.mktemp("attack")
        (folders[name] / NAME).write_bytes((sound / NAME).read_bytes())
        attack.make(folders[name])
    return outcomes(__name__, "load", folders, tmp_path_factory.mktemp("log") / "log")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_classifier_is_refused(results, name):
    """10**7 layers take hours, 10**9 numbers 4 GB, before the file is looked at."""
    assert not results[name]


def test_a_sound_classifier_is_not(sound):
    """What the attacks begin from."""
    image = noise_image(20, 20)
    (labels,) = load_exported(sound / NAME).predict([image])
    (others,) = OnnxClassifier(sound / "classifier.onnx").predict([image])
    assert [label for label, _ in labels] == [label for label, _ in others]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: "", "Expected JSON"),
        (
            lambda values: json.dumps(values | {"class_names": ["a"]}),
            "the output {'logits': [1]} in",
        ),
        (
            lambda values: json.dumps(values | {"preprocessing": values["preprocessing"] | {"image_size": [32, 32]}}),
            "the input {'pixel_values': [3, 32, 32]} in",
        ),
    ],
)
def test_an_onnx_file_whose_card_is_of_another_is_refused(sound, tmp_path, change, message):
    """Labels of another classifier, or an error of onnxruntime at the first image."""
    import onnx

    model = onnx.load(sound / "classifier.onnx")
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = change(json.loads(entry.value))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ExportedFileError) as caught:
        OnnxClassifier(tmp_path / "other.onnx")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"\x08\x07", b"no onnx", os.urandom(1000)], ids=["empty", "two_bytes", "text", "noise"]
)
def test_a_file_that_is_no_onnx_is_one_line(tmp_path, data):
    """onnxruntime has a class of errors of its own."""
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(ExportedFileError, match="Expected a complete ONNX file") as caught:
        OnnxClassifier(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)


def test_a_card_survives_json(sound):
    """The checks accept what the package writes."""
    card = load_exported(sound / NAME).card
    assert ClassifierCard.from_json(card.to_json(), where="x").to_json() == card.to_json()
