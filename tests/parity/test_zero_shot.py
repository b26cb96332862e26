"""Plain zero-shot classification against the official PromptKD repository's CLIP."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.models.towers import image_features, similarity_logits, text_features
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import ClassPrompts
from tests.parity.recorded import facts, recorded_clip, tensors


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_features_and_logits(who: str):
    recorded, tolerance = tensors("A_zeroshot"), facts("A_zeroshot")["tolerance"]
    model = recorded_clip(f"weights_{who}")
    with torch.no_grad():
        image = image_features(model, recorded["in.images"])
        text = text_features(model, recorded["in.input_ids"])
        logits = similarity_logits(model, image, text)
    assert_close(image, recorded[f"expected.{who}.image_features_raw"], rtol=0, atol=tolerance["features_atol"])
    assert_close(text, recorded[f"expected.{who}.text_features_raw"], rtol=0, atol=tolerance["features_atol"])
    assert_close(logits, recorded[f"expected.{who}.logits"], rtol=0, atol=tolerance["logits_atol"])


def test_template_ensemble_normalises_before_and_after_the_mean():
    """Normalising only once moves features by 2e-3: unnoticed in accuracy, visible here."""
    recorded, case = tensors("A_zeroshot"), facts("A_zeroshot")
    model = recorded_clip("weights_student")
    rows = [entry["compact_ids"] for entry in case["ensemble_tokens"]]
    names, templates = tuple(case["classnames"]), tuple(case["ensemble_templates"])
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    assert len(ids) == len(names) * len(templates)
    features = encode_classes(model, ClassPrompts(names, templates, ids))
    with torch.no_grad():
        logits = similarity_logits(model, image_features(model, recorded["in.images"]), features)
    expected = recorded["expected.student.ensemble_logits"]
    assert_close(logits, expected, rtol=0, atol=case["tolerance"]["logits_atol"])
