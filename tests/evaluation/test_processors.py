"""Questions through each family's real processor: training, scoring and generation agree with one question alone."""

import pytest
import torch

from peft_vlm.data import ImageQuestionDataset, QuestionCollator, check_image_tokens, model_inputs, question_inputs
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.evaluation import classify_answers, generate_answers
from peft_vlm.text import candidate_scores
from tests.tiny import noise_image
from tests.tiny_mllm import EOS, tiny_mllm
from tests.tiny_processors import PROCESSORS, tiny_processor

# transformers' PaliGemmaProcessor turns tensors into arrays in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
NAMES = ("me and you", "x")


def questions(name: str, **options: str) -> ImageQuestionDataset:
    """Three images of one size with questions of different length."""
    about = ("Who?", "What is it?", "Why?")
    rows = [{"image": noise_image(50, 30, seed=i), "q": q, "a": NAMES[i % 2]} for i, q in enumerate(about)]
    collator = QuestionCollator(tiny_processor(name), **options)  # type: ignore[arg-type]
    return ImageQuestionDataset(rows, NAMES, question_column="q", answer_column="a", collator=collator)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_batch_is_its_questions_one_by_one(name: str) -> None:
    """Padding, token types and positions must change neither loss nor scores nor what is generated."""
    assert len(PROCESSORS) == 7
    model, dataset = tiny_mllm(name).model, questions(name)
    batch = dataset.collate([dataset[i] for i in range(3)])
    check_image_tokens(model, batch)
    answers = batch["token_labels"]
    assert [answers[i][answers[i] != -100][-1] for i in range(3)] == [EOS] * 3
    counts = (answers != -100).sum(dim=1)
    assert counts.tolist() == [11, 2, 11]
    with torch.no_grad():
        loss = model(**model_inputs(batch), labels=answers).loss
    scores = candidate_scores(model, question_inputs(batch), NAMES, dataset.collator.tokenizer)  # type: ignore[union-attr]
    texts = generate_answers(model, dataset, max_new_tokens=4)
    total = 0.0
    for index in range(3):
        alone = dataset.select([index])
        one = alone.collate([alone[0]])
        with torch.no_grad():
            total += float(model(**model_inputs(one), labels=one["token_labels"]).loss * counts[index])
        expected = candidate_scores(model, question_inputs(one), NAMES, dataset.collator.tokenizer)  # type: ignore[union-attr]
        torch.testing.assert_close(scores[index : index + 1], expected, rtol=1e-4, atol=1e-4)
        assert generate_answers(model, alone, max_new_tokens=4) == [texts[index]]
    assert float(loss) == pytest.approx(total / 24, rel=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_negative_loss_of_an_answer_is_its_score(name: str) -> None:
    """Training and evaluation must mean the same tokens, behind the same question, in the same kind of attention."""
    model, dataset = tiny_mllm(name).model, questions(name)
    for index in range(2):
        batch = dataset.collate([dataset[index]])
        with torch.no_grad():
            loss = model(**model_inputs(batch), labels=batch["token_labels"]).loss
        tokenizer = dataset.collator.tokenizer  # type: ignore[union-attr]
        scores = candidate_scores(model, question_inputs(batch), NAMES, tokenizer, include_end=True)
        assert float(scores[0, index]) == pytest.approx(-float(loss), rel=1e-4)


def test_paligemma_sees_its_answer_token_by_token() -> None:
    """With type 0 the answer would be part of the prefix, and every token would see the ones it has to predict."""
    batch = questions("paligemma").collate([questions("paligemma")[0]])
    assert torch.equal(batch["token_type_ids"] == 1, batch["token_labels"] != -100)


def test_padded_questions_must_fit_into_the_window() -> None:
    """Gemma 3 attends to a window in most layers; padding inside it would push tokens out."""
    model, dataset = tiny_mllm("gemma3").model, questions("gemma3")
    assert len(classify_answers(model, dataset).labels) == 3
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = 24
    model.config.text_config.sliding_window = 24
    with pytest.raises(UnsupportedModelError, match="questions of one length, or fewer than 24 tokens"):
        classify_answers(model, dataset)
    assert len(classify_answers(model, dataset, batch_size=1).labels) == 3
