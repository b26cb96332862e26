"""Classification of datasets: equal to the model, streaming, without autograd, and strict about classes."""

import pytest
import torch
from torch import nn

from peft_vlm.data import EvalTransform, ImageClassificationDataset, TrainTransform
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.evaluation import TextClassifier, classify, cosine_logits, evaluate_classifier, predict_logits
from peft_vlm.text import ClassFeatureCache, encode_classes, tokenize_for_model
from tests.tiny import (
    clip_processor,
    colour_names,
    colour_rows,
    siglip_processor,
    tiny_clip,
    tiny_siglip,
    tiny_tokenizer,
)

TEMPLATE = "a {}."


def colours(per_class: int = 3) -> ImageClassificationDataset:
    """Eighteen images of six classes with the transform of evaluation."""
    return ImageClassificationDataset(
        colour_rows(per_class), colour_names(), transform=EvalTransform(clip_processor())
    )


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_logits_equal_the_models_own(batch_size: int) -> None:
    """Cut text and separate towers against HF's forward at full text length (1e-4 of logits up to 100: float32)."""
    model, dataset = tiny_clip(), colours()
    prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names, template=TEMPLATE)
    predictions = predict_logits(model, dataset, encode_classes(model, prompts), batch_size=batch_size)
    texts = tiny_tokenizer()(
        [f"a {n}." for n in colour_names()], padding="max_length", max_length=40, return_tensors="pt"
    )
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    with torch.no_grad():
        expected = model(input_ids=texts.input_ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(predictions.logits, expected, rtol=0, atol=1e-4)
    assert predictions.labels.tolist() == dataset.labels


def test_siglip_logits_equal_the_models_own() -> None:
    """Scale and bias of SigLIP, and prompts at full length."""
    model = tiny_siglip()
    dataset = colours(1).with_transform(EvalTransform(siglip_processor()))
    prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names, template=TEMPLATE)
    assert prompts.input_ids.shape[1] == 24
    predictions = predict_logits(model, dataset, encode_classes(model, prompts))
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    with torch.no_grad():
        expected = model(input_ids=prompts.input_ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(predictions.logits, expected, rtol=0, atol=1e-4)


def test_results_follow_from_the_logits() -> None:
    """Predicted class, confidence, accuracies and counts of the same logits."""
    model, dataset = tiny_clip(), colours()
    prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names, template=TEMPLATE)
    result = evaluate_classifier(model, dataset, prompts)
    logits = predict_logits(model, dataset, encode_classes(model, prompts)).logits
    labels = torch.tensor(dataset.labels)
    assert torch.equal(result.predicted, logits.argmax(-1))
    torch.testing.assert_close(result.confidence, logits.softmax(-1).amax(-1), rtol=0, atol=1e-6)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(-1) == labels).float().mean().item(), abs=1e-4)
    assert (result.num_images, int(result.confusion.sum())) == (18, 18)
    assert list(result.per_class) == list(colour_names())
    assert result.mean_class_accuracy == pytest.approx(result.accuracy), "all classes have three images"
    assert 0 <= result.ece <= 1


def test_a_class_without_images_has_no_accuracy() -> None:
    """Its 0 would lower the mean over classes."""
    dataset = colours().select([0, 1, 2, 3])
    result = classify(lambda pixels: torch.eye(6)[torch.zeros(len(pixels), dtype=torch.long)], dataset)
    assert result.per_class == {"red": 100.0, "orange": 0.0} | dict.fromkeys(colour_names()[2:])
    assert result.mean_class_accuracy == 50.0


def test_dropout_is_off_and_the_mode_is_restored() -> None:
    """An evaluation during training must be exact and leave training mode on."""
    model = tiny_clip()
    model.text_model.final_layer_norm = nn.Sequential(model.text_model.final_layer_norm, nn.Dropout(0.5))
    model.vision_model.post_layernorm = nn.Sequential(model.vision_model.post_layernorm, nn.Dropout(0.5))
    model.train()
    dataset = colours(1)
    prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names, template=TEMPLATE)
    first, second = (evaluate_classifier(model, dataset, prompts).confidence for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(module.training for module in model.modules())


def test_prompts_of_other_classes_are_refused() -> None:
    """Base prompts on new images give a number, and it means nothing."""
    model, dataset = tiny_clip(), colours()
    prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names[::-1], template=TEMPLATE)
    with pytest.raises(ClassNameError, match="beginning .'red', .* got 6, beginning .'purple'"):
        evaluate_classifier(model, dataset, prompts)


def test_random_crops_are_refused_in_evaluation() -> None:
    """Forgetting to change the transform lowers the accuracy without a trace."""
    dataset = colours().with_transform(TrainTransform(clip_processor()))
    with pytest.raises(DataError, match="got `TrainTransform`.*with_transform"):
        classify(lambda pixels: torch.zeros(len(pixels), 6), dataset)


def test_a_shared_cache_encodes_the_classes_once() -> None:
    """Evaluations during training of the vision side reuse the text features."""
    model, dataset, cache = tiny_clip(), colours(1), ClassFeatureCache()
    prompts = tokenize_for_model(model, tiny_tokenizer(), dataset.class_names, template=TEMPLATE)
    for _ in range(3):
        evaluate_classifier(model, dataset, prompts, cache=cache)
    assert cache.num_computed == 1


def test_the_text_classifier_follows_names_template_and_weights() -> None:
    """Protocols ask one classifier for several class lists."""
    model = tiny_clip()
    classifier = TextClassifier(model, tiny_tokenizer(), template=TEMPLATE)
    pixels = torch.randn(2, 3, 16, 16)

    def expected(names: list[str], template: str) -> torch.Tensor:
        prompts = tokenize_for_model(model, tiny_tokenizer(), names, template=template)
        return cosine_logits(model, encode_classes(model, prompts))(pixels)

    for names, template in ((["cat", "dog"], None), (["bee"], None), (["cat", "dog"], "the {}!")):
        logits = classifier.logits_for(names, template=template)(pixels)
        assert torch.equal(logits, expected(names, template or TEMPLATE))
    with torch.no_grad():
        model.text_projection.weight.mul_(-1)
    assert torch.equal(classifier.logits_for(["cat", "dog"])(pixels), expected(["cat", "dog"], TEMPLATE))
