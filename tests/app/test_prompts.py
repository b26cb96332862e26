"""The tab of pixel prompts, without a browser: clean and prompted image, strength, answers of several models."""

import pytest
import torch
from PIL import Image

from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of
from peft_vlm.app.compare import pairs_html
from peft_vlm.app.prompts import PromptedModels, is_pixel_prompt
from peft_vlm.errors import AdapterError, DataError
from tests.source_tree import ROOT

ADAPTER, OTHER = ROOT / "model_cards/tvp-lamplight", ROOT / "examples/assets/mllm_paligemma"
BLUE = ROOT / "docs/images/lamplight/blue.png"
INKS = ("black", "white", "blue", "orange")


@pytest.fixture(scope="module")
def models() -> PromptedModels:
    """The bundled prompt on the model it was trained on and on another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the adapter names its base model by a path of the repository
        return PromptedModels.load(str(ADAPTER), [str(OTHER)], device="cpu")


def test_pixel_prompts_of_multimodal_models_are_told_from_other_adapters(app_adapter) -> None:
    """Sent to the wrong tab, an adapter ends the app with an error about its base model."""
    assert is_pixel_prompt(str(ADAPTER))
    assert not is_pixel_prompt(str(app_adapter))


def test_without_strength_a_prompt_of_the_whole_image_changes_nothing(models) -> None:
    """The slider must end at the clean image, and the trained prompt be back afterwards."""
    layer = prompt_layer_of(models.first)
    before = layer.prompts[active_name(layer)].detach().clone()
    clean, prompted, prompt = models.views(BLUE, 0.0)
    assert clean.size == prompted.size == prompt.size == (224, 224)
    assert clean.tobytes() == prompted.tobytes()
    for alone, with_prompt in models.answers(BLUE, "what colour is it?", INKS, strength=0.0):
        assert alone == with_prompt
    assert torch.equal(before, layer.prompts[active_name(layer)])
    changed = models.views(BLUE, 1.0)
    assert changed[0].tobytes() == clean.tobytes()
    assert len({prompted.tobytes(), changed[1].tobytes(), models.views(BLUE, 2.0)[1].tobytes()}) == 3
    assert torch.equal(before, layer.prompts[active_name(layer)])


def test_all_models_answer_side_by_side_out_of_a_list_or_freely(models) -> None:
    """Probabilities over the list, the clean image first; without a list a written answer."""
    pairs = models.answers(BLUE, "what colour is it?", INKS)
    assert [clean.name for clean, _ in pairs] == ["mllm_llava", "mllm_paligemma"]
    for clean, prompted in pairs:
        assert clean.predictions != prompted.predictions
        assert {p.label for p in prompted.predictions} == set(INKS)
        assert sum(p.probability for p in prompted.predictions) == pytest.approx(1, abs=1e-4)
    written = models.answers(BLUE, "what colour is it?")
    assert all(answer.text and not answer.error for pair in written for answer in pair)
    assert "clean image" in pairs_html(written)


def test_what_cannot_be_asked_is_said(models) -> None:
    """An empty question, one that holds the image token, answers that read the same: no traceback."""
    with pytest.raises(DataError, match="question of 1 to 500"):
        models.answers(BLUE, "  ")
    with pytest.raises(DataError, match="the image"):
        models.views(ROOT / "README.md")
    token = models.models["mllm_llava"][1].processor.image_token
    first = models.answers(Image.new("RGB", (9, 9)), f"{token} what?", INKS)[0][0]
    assert "image token" in first.error
    with pytest.raises(AdapterError, match="at least one multimodal model"):
        PromptedModels({})
