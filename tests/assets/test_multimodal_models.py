"""The committed multimodal models: small, loadable by the Auto classes, and as good as their cards say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluate_clip import load
from evaluate_mllm import colours, evaluate, sample
from peft_vlm.data.question_collator import QuestionCollator
from peft_vlm.evaluation.mllm import likelihood_accuracy
from tests.source_tree import ROOT

ASSETS = ROOT / "examples" / "assets"
ARCHITECTURES = {
    "mllm_llava": "LlavaForConditionalGeneration",
    "mllm_idefics3": "Idefics3ForConditionalGeneration",
    "mllm_paligemma": "PaliGemmaForConditionalGeneration",
}
#: The same weights on another CPU may turn two images of 150.
TOLERANCE = 1.4


@pytest.fixture(params=sorted(ARCHITECTURES), scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Folder of one bundled model."""
    return ASSETS / request.param


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, float]:
    """The figures of the model's card."""
    return json.loads((folder / "evaluation.json").read_text())


def test_weights_are_small_and_in_half_precision(folder: Path) -> None:
    """A clone must stay cheap: 18 MB each."""
    file = folder / "model.safetensors"
    assert file.stat().st_size <= 18e6
    with safe_open(file, framework="pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.float16}


def test_family_and_tokenizer(folder: Path) -> None:
    """Three families, each with a tokenizer that fits its embedding table."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert type(model).__name__ == ARCHITECTURES[folder.name]
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert (
        tokenizer.decode(tokenizer("shopping cart")["input_ids"], skip_special_tokens=True).strip() == "shopping cart"
    )


def test_answers_are_far_above_chance(recorded: dict[str, float]) -> None:
    """The card's own figures, each against its chance level and the control without an image."""
    assert recorded["icons_chosen"] > 10 * recorded["icons_chance"]
    assert recorded["icons_chosen_shrunken"] > 5 * recorded["icons_chance"]
    assert recorded["icons_chosen_blank"] < 3 * recorded["icons_chance"]
    assert recorded["colour"] > 3 * recorded["colour_chance"]
    assert recorded["emoji_50way"] > 3 * recorded["emoji_50way_chance"]


def test_card_and_figures_agree(folder: Path, recorded: dict[str, float]) -> None:
    """Numbers are written by the script, not by hand."""
    card = (folder / "README.md").read_text()
    for key in ("icons_chosen", "icons_written", "yes_no", "colour", "fashion"):
        assert f"{recorded[key]:.1f}" in card


def test_colours_are_told_as_often_as_the_card_says(folder: Path, recorded: dict[str, float]) -> None:
    """One of the card's figures again, on the same images by the committed weights."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    collator = QuestionCollator(AutoProcessor.from_pretrained(folder))
    plain = load("icons", "test").filter(lambda domain: domain == "plain", input_columns="domain")
    images = int(recorded["images"])
    asked = colours(sample(sample(plain, images), images // 2), collator)
    assert likelihood_accuracy(model, asked) == pytest.approx(recorded["colour"], abs=TOLERANCE)


@pytest.mark.slow
def test_every_figure_is_that_of_the_card(folder: Path, recorded: dict[str, float]) -> None:
    """All of it."""
    measured = evaluate(folder, images=int(recorded["images"]))
    assert measured == pytest.approx(recorded, abs=TOLERANCE)
