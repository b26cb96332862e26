"""Candidate scores: equal to one plain forward pass per candidate, and what cannot be told apart is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

from peft_vlm.data import ImageQuestionDataset, QuestionCollator, question_inputs
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.text import answers as candidates_module
from peft_vlm.text import candidate_scores, tokenize_candidates
from tests.tiny import colour_names, noise_image
from tests.tiny_mllm import ARCHITECTURES, EOS, VOCAB_SIZE, mllm_tokenizer, tiny_mllm
from tests.tiny_questions import colour_questions, llava_processor, tiny_llava

#: What each column holds at answer tokens; None: their ids. Only PaliGemma takes `token_type_ids` here.
TOKEN_VALUES = {"input_ids": None, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 1}
NAMES = ("red", "orange", "yellowish green", "b", "no colour at all")


def batch_of(questions: list[str]) -> dict[str, Tensor]:
    """Inputs of noise images with these questions."""
    rows = [{"image": noise_image(16, 16, seed=i), "q": q} for i, q in enumerate(questions)]
    dataset = ImageQuestionDataset(rows, question_column="q")
    collator = QuestionCollator(llava_processor())
    return question_inputs(collator([dataset[i] for i in range(len(rows))]))


def plain_score(model: Any, inputs: dict[str, Tensor], row: int, answer: list[int]) -> float:
    """One forward pass over question and answer, without cache and padding."""
    length = int(inputs["attention_mask"][row].sum())
    ids = torch.tensor([[*inputs["input_ids"][row, :length].tolist(), *answer]])
    pixels = inputs["pixel_values"][row : row + 1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
    logprobs = logits.log_softmax(-1)
    return sum(logprobs[length + j - 1, token].item() for j, token in enumerate(answer)) / len(answer)


def plain_scores(model: Any, inputs: dict[str, Tensor], rows: list[list[int]]) -> Tensor:
    """The definition, question by question and answer by answer."""
    batch = len(inputs["input_ids"])
    return torch.tensor([[plain_score(model, inputs, b, answer) for answer in rows] for b in range(batch)])


def ids(text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    return mllm_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("chunk_size", [1, 6, None])
@pytest.mark.parametrize("questions", [["What?"] * 3, ["What is in it?", "What?", "Which one, then?"]])
def test_scores_are_those_of_plain_forward_passes(questions: list[str], chunk_size: int | None) -> None:
    """With questions of one length and of several, whatever the number of answers per pass."""
    model, inputs = tiny_llava(), batch_of(questions)
    scores = candidate_scores(model, inputs, NAMES, mllm_tokenizer(), chunk_size=chunk_size)
    expected = plain_scores(model, inputs, [ids(name) for name in NAMES])
    assert (expected.std(dim=0) > 1e-3).all(), "the pictures must matter, else this test proves little"
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_end_counts_when_asked_for() -> None:
    """And makes candidates that begin with each other comparable."""
    model, inputs = tiny_llava(), batch_of(["What?", "Who?"])
    names = ["red", "reddish"]
    scores = candidate_scores(model, inputs, names, mllm_tokenizer(), include_end=True)
    torch.testing.assert_close(
        scores, plain_scores(model, inputs, [[*ids(n), EOS] for n in names]), rtol=1e-5, atol=1e-5
    )
    scores = candidate_scores(model, inputs, names, mllm_tokenizer(), include_end=True, end_token="\n")
    rows = [[*ids(n), *ids("\n")] for n in names]
    torch.testing.assert_close(scores, plain_scores(model, inputs, rows), rtol=1e-5, atol=1e-5)


def test_a_score_by_hand() -> None:
    """A model that knows nothing gives each token the probability 1 / vocabulary."""
    model = tiny_llava()
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = candidate_scores(model, batch_of(["What?"]), NAMES, mllm_tokenizer())
    torch.testing.assert_close(scores, torch.full((1, 5), -float(torch.tensor(float(VOCAB_SIZE)).log())))


def test_answers_of_one_token_need_no_second_pass() -> None:
    """Yes/no and digits: the logits behind the question say it all."""
    model, inputs = tiny_llava(), batch_of(["What?", "What?"])
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    scores = candidate_scores(model, inputs, ["a", "b"], mllm_tokenizer())
    assert len(calls) == 1
    torch.testing.assert_close(scores, plain_scores(model, inputs, [ids("a"), ids("b")]), rtol=1e-5, atol=1e-5)


def test_the_image_is_read_once() -> None:
    """What makes it fast, for any number of candidates and chunks."""
    model, inputs = tiny_llava(), batch_of(["What?", "Who is it?"])
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    first = candidate_scores(model, inputs, NAMES, mllm_tokenizer(), chunk_size=2)
    assert len(calls) == 1
    assert torch.equal(candidate_scores(model, inputs, NAMES, mllm_tokenizer(), chunk_size=2), first)


def test_half_precision_gives_the_same_up_to_its_rounding() -> None:
    """Logarithms are taken in float32; in bfloat16 long answers would lose their differences."""
    model, inputs = tiny_llava(), batch_of(["What?", "Who is it?"])
    expected = candidate_scores(model, inputs, NAMES, mllm_tokenizer())
    half = candidate_scores(model.bfloat16(), inputs, NAMES, mllm_tokenizer())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.03, atol=0.05)


def test_memory_bounds_the_answers_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer copies what the model keeps of its question: for a large model a few are all that fits."""
    model, inputs = tiny_llava(), batch_of(["What?", "What?"])
    passes = []
    model.model.language_model.register_forward_hook(lambda _, __, output: passes.append(len(output[0])))
    expected = candidate_scores(model, inputs, NAMES, mllm_tokenizer())
    assert passes == [2, 10], "the questions, then all five answers to both at once"
    length = inputs["input_ids"].shape[1]
    kept = 3 * 2 * 2 * length * 8 * 4  # layers, keys and values, heads, tokens, width, float32
    monkeypatch.setattr(candidates_module, "MEMORY", 4 * (kept + len(NAMES[-1]) * VOCAB_SIZE * 12))
    passes.clear()
    scores = candidate_scores(model, inputs, NAMES, mllm_tokenizer())
    assert passes[0] == 2
    assert max(passes[1:]) == 4
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_scores_leave_the_model_as_it_was() -> None:
    """Evaluation inside training: mode and gradients stay, dropout is off while scoring."""
    model = tiny_llava().train()
    model.config.text_config.attention_dropout = 0.5
    inputs = batch_of(["What?"])
    scores = candidate_scores(model, inputs, NAMES, mllm_tokenizer())
    assert model.training
    assert not scores.requires_grad
    torch.testing.assert_close(scores, candidate_scores(model.eval(), inputs, NAMES, mllm_tokenizer()))


def test_a_batch_scores_without_its_answers() -> None:
    """The objective's way: the same scores whatever the right answer is."""
    model, dataset = tiny_llava(), colour_questions(1)
    collator = dataset.collate
    items = [dataset[i] for i in range(6)]
    other = [item | {"answer": "something else"} for item in items]
    candidates = tokenize_candidates(mllm_tokenizer(), colour_names())
    scores = [candidate_scores(model, question_inputs(collator(some)), candidates) for some in (items, other)]
    torch.testing.assert_close(scores[0], scores[1])
    assert scores[0].shape == (6, 6)
    with pytest.raises(DataError, match=r"Pass `question_inputs\(batch\)`"):
        candidate_scores(model, collator(items), candidates)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_like_plain_forward_passes(name: str) -> None:
    """Tiles, shifted positions, prefix attention, sliding windows, language models behind a Q-Former."""
    mllm = tiny_mllm(name)
    inputs = mllm.inputs([noise_image(40, 40, seed=seed) for seed in range(2)])
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    scores = candidate_scores(mllm.model, inputs, NAMES, mllm.tokenizer, chunk_size=6)
    expected = []
    for answer in map(ids, NAMES):
        length = len(answer)
        full = dict(inputs)
        for column, value in TOKEN_VALUES.items():
            if column in inputs:
                tokens = torch.tensor(answer) if value is None else torch.full((length,), value)
                full[column] = torch.cat([inputs[column], tokens.expand(2, -1).to(inputs[column].dtype)], dim=1)
        with torch.no_grad():
            logprobs = mllm.model(**full).logits[:, -length - 1 : -1].log_softmax(-1)
        expected.append(logprobs[:, range(length), answer].mean(dim=1))
    torch.testing.assert_close(scores, torch.stack(expected, dim=1), rtol=1e-5, atol=2e-5)
    assert (scores.std(dim=0) > 1e-4).any(), "the pictures must matter"


def test_blip2_with_an_encoder_scores_like_its_own_loss() -> None:
    """The loss of the model on one answer is the negative score."""
    text = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    config = tiny_mllm("blip_2").model.config.to_dict() | {"text_config": text.to_dict()}
    model = Blip2ForConditionalGeneration(Blip2Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    inputs = tiny_mllm("blip_2").inputs([noise_image(24, 24, seed=seed) for seed in range(2)])
    inputs["attention_mask"][1, -3:] = 0
    scores = candidate_scores(model, inputs, NAMES, mllm_tokenizer(), chunk_size=4)
    assert (scores.std(dim=0) > 1e-5).all()
    for row in range(2):
        one = {name: column[row : row + 1] for name, column in inputs.items()}
        for column, name in enumerate(NAMES):
            with torch.no_grad():
                loss = model(**one, labels=torch.tensor([ids(name)])).loss
            torch.testing.assert_close(scores[row, column], -loss, rtol=1e-5, atol=1e-5)


def test_candidates_that_cannot_be_told_apart_are_refused() -> None:
    """Each error names the candidates."""
    tokenizer = mllm_tokenizer()
    with pytest.raises(ClassNameError, match="Answer 1 is empty: got ''"):
        tokenize_candidates(tokenizer, ["a", ""])
    with pytest.raises(ClassNameError, match="'red' and 'red' have the same tokens"):
        tokenize_candidates(tokenizer, ["red", "blue", "red"])
    with pytest.raises(ClassNameError, match="'fire' is the beginning of 'fire truck'"):
        tokenize_candidates(tokenizer, ["fire truck", "fire"])
    assert tokenize_candidates(tokenizer, ["fire truck", "fire"], include_end=True).include_end
    with pytest.raises(ClassNameError, match="at least one candidate"):
        tokenize_candidates(tokenizer, [])
    with pytest.raises(ClassNameError, match="a list of at least one"):
        tokenize_candidates(tokenizer, "red")


def test_inputs_that_cannot_be_continued_are_refused() -> None:
    """Left padding would put the answer in the wrong place."""
    model, inputs = tiny_llava(), batch_of(["What?", "Which is it?"])
    with pytest.raises(DataError, match="a tokenizer for candidates given as texts"):
        candidate_scores(model, inputs, NAMES)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(DataError, match="padded on the right"):
        candidate_scores(model, inputs, NAMES, mllm_tokenizer())
