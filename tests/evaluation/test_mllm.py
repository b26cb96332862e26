"""Evaluation of image-text models and prompts: the three conditions, corruptions, sizes of training sets."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_vlm.data import ImageQuestionDataset, QuestionCollator
from peft_vlm.data.corruptions import Corruption
from peft_vlm.data.shrink import ShrinkingProcessor
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.evaluation import (
    PromptEffect,
    classify_answers,
    corruption_robustness,
    data_scale_curve,
    evaluate_prompt,
    likelihood_accuracy,
    mean_effect,
)
from peft_vlm.methods.tvp import TVPConfig, prompt_layer_of
from peft_vlm.text import candidate_scores, tokenize_candidates
from tests.tiny import colour_names
from tests.tiny_mllm import mllm_tokenizer
from tests.tiny_questions import colour_questions, llava_processor, tiny_llava


def prompted_llava(shrink: str = "model") -> PeftModel:
    """A tiny LLaVA with a strong random prompt."""
    config = TVPConfig.for_processor(llava_processor(), canvas_size=32, border=6, shrink=shrink, init_weights=False)
    model = get_peft_model(tiny_llava(), config)
    with torch.no_grad():
        for prompt in prompt_layer_of(model).prompts.values():
            prompt.mul_(10)
    assert isinstance(model, PeftModel)
    return model.eval()


def test_the_most_likely_class_name_is_the_answer() -> None:
    """Against scores of each question alone."""
    model, dataset = tiny_llava(), colour_questions()
    result = classify_answers(model, dataset, batch_size=5)
    candidates = tokenize_candidates(mllm_tokenizer(), colour_names())
    for index in range(len(dataset)):
        inputs = dataset.collator.encode_questions([dataset[index]])  # type: ignore[union-attr]
        scores = candidate_scores(model, inputs, candidates)[0]
        assert result.predicted[index] == scores.argmax()
        torch.testing.assert_close(result.confidence[index], scores.softmax(-1).max(), rtol=1e-4, atol=1e-5)
    assert result.labels.tolist() == dataset.labels
    right = (result.predicted == torch.tensor(dataset.labels)).float().mean()
    assert likelihood_accuracy(model, dataset) == pytest.approx(100 * float(right))


def test_candidates_and_labels_must_fit() -> None:
    """Labels would mean other names."""
    model, dataset = tiny_llava(), colour_questions(1)
    with pytest.raises(ClassNameError, match="candidates for the dataset's 6 class names"):
        classify_answers(model, dataset, candidates=tokenize_candidates(mllm_tokenizer(), ["red", "blue"]))
    free = ImageQuestionDataset([{"image": dataset.image(0)}], ["red"], question="?", collator=dataset.collator)
    with pytest.raises(DataError, match="questions with labels"):
        classify_answers(model, free)


def test_three_conditions_are_measured() -> None:
    """Full size is the base model, shrunken the adapter with a zero prompt, prompted the adapter."""

    def logits(model: torch.nn.Module, dataset: ImageQuestionDataset) -> float:
        batch = QuestionCollator(llava_processor()).encode_questions([dataset[0]])
        with torch.no_grad():
            return float(model(**batch).logits[0, -1, 5])

    model, dataset = prompted_llava(), colour_questions(1)
    effect = evaluate_prompt(model, dataset, score=logits)
    assert effect.full_size == pytest.approx(logits(tiny_llava(), dataset), abs=1e-5)
    assert effect.prompted == logits(model, dataset)
    with torch.no_grad():
        for prompt in prompt_layer_of(model).prompts.values():
            prompt.zero_()
    assert effect.shrunken == pytest.approx(logits(model, dataset), abs=1e-5)
    assert len({round(value, 4) for value in (effect.full_size, effect.shrunken, effect.prompted)}) == 3
    assert effect.gain == effect.prompted - effect.shrunken
    assert effect.gain_over_full_size == effect.prompted - effect.full_size


def test_a_shrinking_processor_serves_the_two_conditions_with_the_adapter() -> None:
    """The base model must see the image at full size."""
    seen = []

    def border(model: torch.nn.Module, dataset: ImageQuestionDataset) -> float:
        pixels = dataset.collate([dataset[0]])["pixel_values"]
        seen.append(float(pixels[0, :, :6].std(dim=(1, 2)).max()))
        return 0.0

    shrinking = QuestionCollator(ShrinkingProcessor(llava_processor(), canvas_size=32, border=6, upscale=True))
    evaluate_prompt(prompted_llava("processor"), colour_questions(1), score=border, shrinking_collator=shrinking)
    assert seen[0] > 0.01
    assert seen[1:] == [pytest.approx(0, abs=1e-5)] * 2, "the black border has no spread"


def test_corruptions_reach_the_images() -> None:
    """Every kind and level is asked for once per condition, on the images of that damage."""
    asked = []

    def score(model: torch.nn.Module, dataset: ImageQuestionDataset) -> float:
        asked.append(dataset.augmentation)
        return 1.0

    dataset = colour_questions(1)
    effects = corruption_robustness(prompted_llava(), dataset, kinds=["jpeg", "contrast"], levels=[1, 5], score=score)
    assert {kind: list(levels) for kind, levels in effects.items()} == {"jpeg": [1, 5], "contrast": [1, 5]}
    assert asked == [Corruption(kind, level) for kind in ("jpeg", "contrast") for level in (1, 5) for _ in range(3)]
    assert dataset.augmentation is None


def test_effects_are_averaged_by_condition() -> None:
    """By hand."""
    assert mean_effect([PromptEffect(1.0, 2.0, 3.0), PromptEffect(3.0, 2.0, 7.0)]) == PromptEffect(2.0, 2.0, 5.0)
    with pytest.raises(DataError, match="at least one effect"):
        mean_effect([])


def test_smaller_training_sets_are_part_of_larger_ones() -> None:
    """Else the curve shows the luck of the draw."""
    drawn = {}

    def train(dataset: ImageQuestionDataset) -> dict[str, PromptEffect]:
        drawn[len(dataset)] = {dataset._rows[i] for i in range(len(dataset))}
        return {"llava": PromptEffect(0.0, 0.0, float(len(dataset)))}

    curve = data_scale_curve(train, colour_questions(2), [2, 6, 12], seed=1)
    assert {size: effects["llava"].prompted for size, effects in curve.items()} == {2: 2.0, 6: 6.0, 12: 12.0}
    assert drawn[2] < drawn[6] < drawn[12] == set(range(12))
    with pytest.raises(DataError, match=r"sizes from 1 to 12, the questions there are, got \[0, 13\]"):
        data_scale_curve(train, colour_questions(2), [0, 4, 13])
