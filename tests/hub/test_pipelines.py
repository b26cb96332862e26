"""transformers' own pipelines with adapters of every method, from memory and by name; other models stay theirs."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPModel, CLIPProcessor, pipeline

from peft_vlm import PromptedClassifier
from peft_vlm.errors import AdapterError, UnsupportedModelError
from tests.cases import ADAPTER_CASES, Case, base_model, images, perturb
from tests.tiny import clip_processor, colour_names, tiny_clip, tiny_tokenizer

NAMES = list(colour_names(4))
WITH_TEXT = [case for case in ADAPTER_CASES if not case.text_free]
WITHOUT = [case for case in ADAPTER_CASES if case.text_free]


def tools() -> dict[str, object]:
    return {"tokenizer": tiny_tokenizer(), "image_processor": clip_processor()}


def saved(case: Case, folder) -> str:
    """An adapter and its base model on disk."""
    tiny_clip().save_pretrained(folder / "base")
    CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer()).save_pretrained(folder / "base")
    model = get_peft_model(CLIPModel.from_pretrained(folder / "base"), case.config())
    perturb(model)
    config = model.active_peft_config
    if not config.class_names:
        config.class_names = NAMES
    config.template, config.image_size = "a {}.", [16, 16]
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def scores(rows) -> dict[str, float]:
    return {row["label"]: row["score"] for row in rows}


@pytest.mark.parametrize("case", WITH_TEXT, ids=lambda case: case.adapter)
def test_zero_shot_classification_answers_as_the_classifier(case, tmp_path) -> None:
    """A template without the places of learned context was refused, whichever it was."""
    folder = saved(case, tmp_path)
    classifier = PromptedClassifier.from_pretrained(folder, device="cpu")
    pictures = [images(1).image(index) for index in range(3)]
    expected = [scores(row) for row in classifier(pictures, NAMES)]
    classify = pipeline("zero-shot-image-classification", model=classifier.model, **tools())
    if case.image_conditioned:
        with pytest.raises(AdapterError, match="depend on the image.*Classify with `PromptedClassifier`"):
            classify(pictures, candidate_labels=NAMES)
        return
    for batch_size in (1, 2):
        found = [scores(row) for row in classify(pictures, candidate_labels=NAMES, batch_size=batch_size)]
        assert found == [pytest.approx(row, rel=1e-4) for row in expected]
    other = classify(pictures[0], candidate_labels=NAMES, hypothesis_template="the {}")
    assert scores(other) == pytest.approx(
        scores(PromptedClassifier(classifier.model, *tools().values(), template="the {}")(pictures[0], NAMES)),
        rel=1e-4,
    )
    with pytest.raises(UnsupportedModelError, match="which classifies by class names"):
        pipeline("image-classification", model=classifier.model, image_processor=clip_processor())(pictures[0])


@pytest.mark.parametrize("case", WITHOUT, ids=lambda case: case.adapter)
def test_stored_classes_answer_in_image_classification(case, tmp_path) -> None:
    """It ended in `KeyError: 'logits'`."""
    classifier = PromptedClassifier.from_pretrained(saved(case, tmp_path), device="cpu")
    classify = pipeline("image-classification", model=classifier.model, image_processor=clip_processor())
    pictures = [images(1).image(index) for index in range(3)]
    assert [scores(row) for row in classify(pictures, top_k=9)] == [
        pytest.approx(scores(row), rel=1e-4) for row in classifier(pictures)
    ]
    assert [row["label"] for row in classify(pictures[0], top_k=2)] == [
        row["label"] for row in classifier(pictures[0], top_k=2)
    ]
    with pytest.raises(AdapterError, match="reads no text"):
        pipeline("zero-shot-image-classification", model=classifier.model, **tools())(pictures[0], NAMES)


@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda case: case.adapter)
def test_by_name_what_cannot_classify_says_so_before_a_model_is_built(case, tmp_path, monkeypatch) -> None:
    """A head of random weights was built for it, and reported as if it had to be trained."""
    folder = saved(case, tmp_path)
    built = []
    plain = CLIPModel.__init__
    monkeypatch.setattr(CLIPModel, "__init__", lambda self, *a, **k: built.append(1) or plain(self, *a, **k))
    if case.text_free:
        classify = pipeline("image-classification", model=folder, image_processor=clip_processor(), device="cpu")
        picture = images(1).image(0)
        expected = scores(PromptedClassifier.from_pretrained(folder, device="cpu")(picture))
        assert scores(classify(picture, top_k=9)) == pytest.approx(expected, rel=1e-4)
        return
    with pytest.raises(UnsupportedModelError, match="Use 'zero-shot-image-classification'"):
        pipeline("image-classification", model=folder, image_processor=clip_processor())
    assert not built


def test_other_models_keep_the_pipelines_of_transformers() -> None:
    """LoRA of PEFT, and a plain CLIP: the same numbers as from their own forward, with the pipeline's template."""
    picture = images(1).image(0)
    lora = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], r=2)).eval()
    for model in (base_model(), lora):
        classify = pipeline("zero-shot-image-classification", model=model, **tools())
        ids = tiny_tokenizer()([f"This is a photo of {name}." for name in NAMES], padding=True, return_tensors="pt")
        pixels = clip_processor()(picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = model(pixel_values=pixels, **ids).logits_per_image
        expected = dict(zip(NAMES, logits.softmax(-1)[0].tolist(), strict=True))
        assert scores(classify(picture, candidate_labels=NAMES)) == pytest.approx(expected, rel=1e-5)
    assert isinstance(lora, PeftModel)


def test_a_classifier_says_what_it_is(tmp_path) -> None:
    classifier = PromptedClassifier.from_pretrained(saved(WITH_TEXT[0], tmp_path), device="cpu")
    assert repr(classifier) == (
        f"PromptedClassifier(CLIPModel, {WITH_TEXT[0].adapter.upper()} adapter, 4 classes, template='a {{}}.')"
    )
    assert len(classifier(images(1).image(0))) == 4
    assert len(classifier([images(1).image(0)] * 3, top_k=2, batch_size=2)[2]) == 2
    assert repr(PromptedClassifier(tiny_clip(), *tools().values())).startswith(
        "PromptedClassifier(CLIPModel, no adapter, no"
    )
