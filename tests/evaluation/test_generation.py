"""Generated answers: the same for one question alone and in a batch, ended where answers end."""

from typing import Any

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

from peft_vlm.data import ImageQuestionDataset, QuestionCollator, RandomCrop
from peft_vlm.errors import DataError
from peft_vlm.evaluation import generate_answers, generation_accuracy
from tests.tiny import noise_image
from tests.tiny_mllm import EOS, VOCAB_SIZE, mllm_tokenizer, tiny_mllm
from tests.tiny_questions import colour_questions, llava_processor, tiny_llava


def questions(**options: Any) -> ImageQuestionDataset:
    """Four images with questions of different length."""
    rows = [{"image": noise_image(32, 32, seed=i), "q": "Why?" * (1 + i % 3), "a": "b"} for i in range(4)]
    collator = QuestionCollator(llava_processor(), **options)
    return ImageQuestionDataset(rows, question_column="q", answer_column="a", collator=collator)


def greedy(model: Any, dataset: ImageQuestionDataset, index: int, *, steps: int, stops: tuple[int, ...]) -> str:
    """The definition: one question alone, one plain forward pass per token."""
    inputs = dataset.collator.encode_questions([dataset[index]])  # type: ignore[union-attr]
    ids, written = inputs["input_ids"], []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        written.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[written[-1]]])], dim=1)
        if written[-1] in stops:
            break
    return str(mllm_tokenizer().decode([token for token in written if token not in stops], skip_special_tokens=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_greedy_and_do_not_depend_on_the_batch(batch_size: int) -> None:
    """Padding behind a short question would make the model write behind padding."""
    model, dataset = tiny_llava(), questions()
    texts = generate_answers(model, dataset, max_new_tokens=6, batch_size=batch_size)
    expected = [greedy(model, dataset, i, steps=6, stops=(EOS,)).strip() for i in range(4)]
    assert texts == expected
    assert len(set(texts)) > 1, "the pictures must matter"


def test_answers_end_at_the_end_token() -> None:
    """Here the end is a letter that the model writes into one of the answers."""
    model = tiny_llava()
    full = generate_answers(model, questions(), max_new_tokens=8)
    assert [text.count("@") for text in full] == [2, 0, 0, 0]
    ended = generate_answers(model, questions(end_token="@"), max_new_tokens=8)
    assert ended == [full[0].split("@")[0], *full[1:]]


@pytest.mark.parametrize("several", [False, True])
def test_answers_end_where_the_model_says_so_too(several: bool) -> None:
    """Gemma 3 ends a turn with a token that is not its tokenizer's end, and would go on with more of the same."""
    model = tiny_llava()
    full = generate_answers(model, questions(), max_new_tokens=8)
    (token,) = mllm_tokenizer()("@", add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [EOS, token] if several else token
    ended = generate_answers(model, questions(), max_new_tokens=8)
    assert ended == [full[0].split("@")[0] + "@", *full[1:]]


def test_a_decoder_with_encoder_does_not_repeat_the_question() -> None:
    """BLIP-2 with T5: everything generated is the answer."""
    text = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    config = tiny_mllm("blip_2").model.config.to_dict() | {"text_config": text.to_dict()}
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(Blip2Config(**config)).eval()
    inputs = tiny_mllm("blip_2").inputs([noise_image(24, 24)])
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    from peft_vlm.evaluation.mllm import _new_tokens

    assert torch.equal(_new_tokens(ids, inputs["input_ids"]), ids)
    repeated = torch.cat([inputs["input_ids"], ids], dim=1)
    assert torch.equal(_new_tokens(repeated, inputs["input_ids"]), ids)


def test_generation_accuracy_counts_matching_answers() -> None:
    """The model's own answers, two of them spoiled."""
    model, dataset = tiny_llava(), questions()
    texts = generate_answers(model, dataset, max_new_tokens=4)
    rows = [{"image": dataset.image(i), "q": dataset.question(i), "a": texts[i]} for i in range(4)]
    rows[0]["a"] = rows[3]["a"] = "something else"
    known = ImageQuestionDataset(rows, question_column="q", answer_column="a", collator=dataset.collator)
    assert generation_accuracy(model, known, max_new_tokens=4) == 50.0
    unknown = ImageQuestionDataset(rows, question_column="q", collator=dataset.collator)
    with pytest.raises(DataError, match="got none for question 0"):
        generation_accuracy(model, unknown)


def test_training_data_is_refused() -> None:
    """Random crops lower every figure; a dataset without collator cannot be asked."""
    with pytest.raises(DataError, match="without random crops"):
        generate_answers(tiny_llava(), colour_questions(augmentation=RandomCrop()))
    with pytest.raises(DataError, match=r"`QuestionCollator`, got NoneType"):
        generate_answers(tiny_llava(), colour_questions(collator=None))
