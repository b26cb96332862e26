"""The committed CLIPs: they load as plain `CLIPModel`s, are as good as their cards say, and stay small."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer, CLIPModel

from evaluate_clip import TEMPLATES, ZeroShotModel, accuracy, evaluate, load
from tests.source_tree import ROOT

ASSETS = ROOT / "examples" / "assets"
LIMITS_MB = {"clip_student": 12, "clip_teacher": 24}
#: The same weights on another CPU may turn one or two images of a small split.
TOLERANCE = 0.8


@pytest.fixture(params=sorted(LIMITS_MB), scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """Folder of one bundled model."""
    return ASSETS / request.param


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, dict[str, float]]:
    """The figures of the model's card."""
    return json.loads((folder / "evaluation.json").read_text())


def test_weights_are_small_and_in_half_precision(folder: Path) -> None:
    """A clone must stay cheap."""
    file = folder / "model.safetensors"
    assert file.stat().st_size <= LIMITS_MB[folder.name] * 1e6
    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())
        assert len(keys) > 100
        assert {tensors.get_tensor(key).dtype for key in keys} == {torch.float16}


def test_tokenizer_fits_the_model_and_pools_at_the_first_end_token(folder: Path) -> None:
    """An empty or foreign tokenizer gives chance accuracy without any message."""
    model = CLIPModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config.text_config
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    assert tokenizer.pad_token_id == config.pad_token_id
    tokens = tokenizer(["house", "a picture of a shopping cart."], padding=True, return_tensors="pt")
    alone = model.get_text_features(**tokenizer(["house"], return_tensors="pt")).pooler_output
    together = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=2e-3)


def test_processor_loads_and_keeps_48_pixels(folder: Path) -> None:
    """`AutoProcessor` is what pipelines use."""
    processor = AutoProcessor.from_pretrained(folder)
    image = load("icons", "val")[0]["image"].convert("RGB")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    assert float(pixels.abs().max()) < 4


def test_emoji_subgroup_accuracy_is_that_of_the_card(folder: Path, recorded: dict[str, dict[str, float]]) -> None:
    """A quick part of the card's figures, recomputed from weights and images."""
    clip, data = ZeroShotModel(folder), load("emoji", "test")
    text = clip.classes(data.features["label"].names, TEMPLATES["emoji"])
    measured = accuracy(clip.images(data) @ text.T, torch.tensor(data["label"]))
    assert measured == pytest.approx(recorded["emoji"]["subgroup_flat"], abs=TOLERANCE)


@pytest.mark.slow
def test_every_figure_is_that_of_the_card(folder: Path, recorded: dict[str, dict[str, float]]) -> None:
    """All of it."""
    measured = evaluate(folder)
    assert measured.keys() == recorded.keys()
    for name, figures in recorded.items():
        assert measured[name] == pytest.approx(figures, abs=TOLERANCE)


def test_the_card_quotes_the_recorded_figures(folder: Path, recorded: dict[str, dict[str, float]]) -> None:
    """Numbers typed by hand go stale."""
    card = (folder / "README.md").read_text()
    quoted = [recorded["icons"]["all"], recorded["emoji"]["subgroup_flat"], recorded["fashion"]["all"]]
    assert not [figure for figure in quoted if f"{figure:.1f}" not in card]


def test_the_student_recognises_far_more_than_chance() -> None:
    """The floor of the recipe; every adaptation result starts from here."""
    student = json.loads((ASSETS / "clip_student" / "evaluation.json").read_text())
    assert student["icons"]["all"] > 50
    assert student["emoji"]["seen_50way_flat"] > 40
    assert student["fashion"]["all"] > 15
    assert student["icons"]["control_permuted_names"] < 5


def test_the_teacher_is_clearly_better_than_the_student() -> None:
    """Distillation needs a teacher that knows more: five points or more on two of the three sets."""
    student, teacher = (
        json.loads((ASSETS / name / "evaluation.json").read_text()) for name in ("clip_student", "clip_teacher")
    )
    headline = (("icons", "all"), ("emoji", "seen_50way_flat"), ("fashion", "all"))
    gains = [teacher[name][key] - student[name][key] for name, key in headline]
    assert sum(gain >= 5 for gain in gains) >= 2, gains


def test_tokenizer_does_not_cut_by_itself(folder: Path) -> None:
    """A stored truncation would hide class names that do not fit."""
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    assert len(AutoTokenizer.from_pretrained(folder)("house " * 50, verbose=False)["input_ids"]) == 52
