"""Batches of questions: which tokens count, padding, chat templates, image tokens."""

import pickle

import pytest
import torch

from peft_vlm.adapters.pixel_prompt import PixelSettings
from peft_vlm.data import ImageQuestionDataset, QuestionCollator, check_image_tokens, model_inputs, question_inputs
from peft_vlm.data.question_collator import check_shrinking
from peft_vlm.data.shrink import ShrinkingProcessor
from peft_vlm.errors import DataError, UnsupportedModelError
from peft_vlm.text.answers import answer_token_ids, last_positions, resolve_end_token
from tests.tiny import clip_processor, noise_image
from tests.tiny_mllm import ARCHITECTURES, BOS, EOS, IMAGE, PAD, VOCAB_SIZE, mllm_tokenizer, tiny_mllm
from tests.tiny_questions import NUM_IMAGE_TOKENS, QUESTION, colour_questions, llava_processor, tiny_llava


def ids(text: str) -> list[int]:
    """Token ids of a text without special tokens around it."""
    return mllm_tokenizer()(text, add_special_tokens=False)["input_ids"]


def two_questions() -> ImageQuestionDataset:
    """A short and a long question with answers of different length."""
    rows = [
        {"image": noise_image(16, 16), "q": "Who?", "a": "me and you"},
        {"image": noise_image(20, 16, seed=1), "q": "What is it?", "a": "x"},
    ]
    return ImageQuestionDataset(
        rows, question_column="q", answer_column="a", collator=QuestionCollator(llava_processor())
    )


def items(dataset: ImageQuestionDataset) -> list:
    """All items."""
    return [dataset[i] for i in range(len(dataset))]


def test_sequences_are_question_answer_end_and_padding() -> None:
    """Written out by hand: image tokens, newline, question, answer, end; loss on answer and end only."""
    batch = two_questions().collate(items(two_questions()))
    image = [IMAGE] * NUM_IMAGE_TOKENS
    first = [*image, *ids("\nWho?"), *ids("me and you"), EOS]
    second = [*image, *ids("\nWhat is it?"), *ids("x"), EOS]
    width = max(len(first), len(second))
    assert len(first) != len(second)
    for row, (tokens, answer) in enumerate([(first, 11), (second, 2)]):
        padding = width - len(tokens)
        assert batch["input_ids"][row].tolist() == [*tokens, *[PAD] * padding]
        assert batch["attention_mask"][row].tolist() == [*[1] * len(tokens), *[0] * padding]
        expected = [*[-100] * (len(tokens) - answer), *tokens[-answer:], *[-100] * padding]
        assert batch["token_labels"][row].tolist() == expected
    assert batch["labels"].tolist() == [-1, -1]
    assert batch["index"].tolist() == [0, 1]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "pixel_values"}


def test_pixels_are_those_of_the_processor() -> None:
    """The collator must not resize or normalise on its own."""
    dataset = two_questions()
    pixels = dataset.collate(items(dataset))["pixel_values"]
    expected = clip_processor(32)([item["image"] for item in items(dataset)], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)


def test_the_loss_of_a_batch_is_the_mean_over_all_answer_tokens() -> None:
    """A mean per question first would weigh tokens of long answers less than the official code does."""
    model, dataset = tiny_llava(), two_questions()
    batch = dataset.collate(items(dataset))
    loss = model(**model_inputs(batch), labels=batch["token_labels"]).loss
    values = []
    for item in items(dataset):
        one = dataset.collate([item])
        counted = one["token_labels"][0] != -100
        logits = model(**model_inputs(one)).logits[0].log_softmax(-1)
        places = counted.nonzero()[:, 0]
        values += logits[places - 1, one["input_ids"][0, places]].tolist()
    assert len(values) == 13
    torch.testing.assert_close(loss.item(), -sum(values) / 13, rtol=1e-5, atol=1e-5)


def test_the_part_before_the_answers_is_what_the_questions_alone_give() -> None:
    """Scoring with any trace of the right answer in sight would be worthless."""
    model, dataset = tiny_llava(), two_questions()
    batch = dataset.collate(items(dataset))
    inputs = question_inputs(batch)
    alone = dataset.collator.encode_questions(items(dataset))
    assert torch.equal(inputs["attention_mask"], alone["attention_mask"])
    kept = alone["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][kept], alone["input_ids"][kept])
    last = last_positions(inputs["attention_mask"])
    rows = torch.arange(2)
    with torch.no_grad():
        ours, theirs = (model(**each).logits[rows, last] for each in (inputs, alone))
    torch.testing.assert_close(ours, theirs)
    unknown = [item | {"answer": None} for item in items(dataset)]
    without = dataset.collate(unknown)
    assert "token_labels" not in without
    assert torch.equal(question_inputs(without)["input_ids"], alone["input_ids"])


def test_a_chat_template_writes_the_question() -> None:
    """And its start token is not doubled."""
    processor = llava_processor()
    processor.chat_template = (
        "{{ bos_token }}USER: {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}<image>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    collator = QuestionCollator(processor, answer_prefix=" It is", answer_format=" {}")
    assert collator.prompt("What?") == "<s>USER: <image>What? ASSISTANT: It is"
    batch = collator(items(colour_questions())[:1])
    expected = [BOS, *ids("USER: "), *[IMAGE] * 16, *ids(f"{QUESTION} ASSISTANT: It is"), *ids(" red"), EOS]
    assert batch["input_ids"][0].tolist() == expected
    assert QuestionCollator(processor, template="<image>{question}!").prompt("What?") == "<image>What?!"


def test_a_newline_can_end_the_answer() -> None:
    """As in the official TVP code."""
    collator = QuestionCollator(llava_processor(), end_token="\n")
    labels = collator(items(colour_questions())[:1])["token_labels"][0]
    assert labels[labels != -100].tolist() == [*ids("red"), *ids("\n")]
    nothing = QuestionCollator(llava_processor(), end_token="")
    labels = nothing(items(colour_questions())[:1])["token_labels"][0]
    assert labels[labels != -100].tolist() == ids("red")


def test_candidates_are_tokenised_as_the_answers_of_a_batch() -> None:
    """Scores of other tokens than those that were trained would favour whatever they happen to be."""
    dataset = colour_questions()
    collator = QuestionCollator(llava_processor(), answer_format="{}.", end_token="a")
    labels = collator(items(dataset)[:1])["token_labels"][0]
    candidates = collator.candidates(dataset.class_names, include_end=True)
    assert candidates.names == dataset.class_names
    assert candidates.token_ids[dataset.labels[0]] == tuple(labels[labels >= 0].tolist())
    shorter = collator.candidates(dataset.class_names, include_end=False)
    assert shorter.token_ids[0] == candidates.token_ids[0][:-1]


def test_an_encoder_decoder_gets_the_answer_apart() -> None:
    """The question goes to the encoder; the loss is on everything the decoder writes."""
    collator = QuestionCollator(llava_processor(), encoder_decoder=True)
    some = items(colour_questions())
    batch = collator([some[0], some[4]])
    assert batch["token_labels"].tolist() == [
        [*ids("red"), EOS, *[-100] * 3],
        [*ids("yellow"), EOS],
    ]
    assert batch["input_ids"].shape[1] == NUM_IMAGE_TOKENS + len("\n" + QUESTION)
    assert torch.equal(question_inputs(batch)["input_ids"], batch["input_ids"])


def test_a_second_processor_prepares_the_image_for_clip() -> None:
    """Same images, other size."""
    collator = QuestionCollator(llava_processor(), clip_processor=clip_processor(8))
    batch = collator(items(colour_questions())[:3])
    assert batch["clip_pixel_values"].shape == (3, 3, 8, 8)
    assert "clip_pixel_values" not in model_inputs(batch)


def test_questions_can_be_padded_on_the_left_for_generation() -> None:
    """Otherwise a model would write behind padding."""
    dataset = two_questions()
    encoded = dataset.collator.encode_questions(items(dataset), padding_side="left")
    assert encoded["attention_mask"][0, 0] == 0
    assert encoded["attention_mask"][:, -1].tolist() == [1, 1]


def test_image_tokens_and_features_are_compared_before_training() -> None:
    """The error names both numbers."""
    model, dataset = tiny_llava(), colour_questions()
    check_image_tokens(model, dataset.collate(items(dataset)))
    wrong = QuestionCollator(llava_processor(patch_size=4))
    with pytest.raises(DataError, match=r"128 tokens \(\[64, 64\] per question\) and 32 features for 2 images"):
        check_image_tokens(model, wrong(items(dataset)[:2]))
    batch = dataset.collate(items(dataset)[:2])
    batch["input_ids"] = batch["input_ids"].clone().masked_fill(batch["input_ids"] == IMAGE, 5)
    with pytest.raises(DataError, match=r"Question 0 of the batch has no image token \(id 260\)"):
        check_image_tokens(model, batch)
    batch = dataset.collate(items(dataset)[:2])
    batch["input_ids"][1, -1] = 4000
    with pytest.raises(DataError, match=f"below the vocabulary's {VOCAB_SIZE}, got 4000"):
        check_image_tokens(model, batch)
    blip = tiny_mllm("blip_2")
    inputs = blip.inputs([noise_image(24, 24)])
    check_image_tokens(blip.model, inputs)
    blip.model.config.image_token_index = None
    with pytest.raises(UnsupportedModelError, match="names no image token"):
        check_image_tokens(blip.model, inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_image_tokens_are_counted_for_every_architecture(name: str) -> None:
    """One image token too many is found, whatever form the features have."""
    mllm = tiny_mllm(name)
    inputs = mllm.inputs([noise_image(50, 30, seed=seed) for seed in range(2)])
    check_image_tokens(mllm.model, inputs)
    inputs["input_ids"][0, -1] = IMAGE
    with pytest.raises(DataError, match="Image tokens and image features differ"):
        check_image_tokens(mllm.model, inputs)


def test_bad_questions_and_settings_are_refused() -> None:
    """Each would train on something else than asked, without a word."""
    processor = llava_processor()
    some = items(colour_questions())
    with pytest.raises(DataError, match="contains the image token"):
        QuestionCollator(processor)([some[0] | {"question": "Is <image> red?"}])
    with pytest.raises(DataError, match="Image 1 has no answer"):
        QuestionCollator(processor)([some[0], some[1] | {"answer": None}])
    with pytest.raises(DataError, match="Answer 0 is empty"):
        QuestionCollator(processor)([some[0] | {"answer": " "}])
    with pytest.raises(DataError, match=r"a `template` with '\{question\}'"):
        QuestionCollator(processor, template="<image>")
    processor.tokenizer.pad_token = None
    with pytest.raises(DataError, match="has no padding token"):
        QuestionCollator(processor)


def test_a_collator_survives_the_way_to_a_worker_process() -> None:
    """With a shrinking processor inside it."""
    processor = ShrinkingProcessor(llava_processor(), canvas_size=32, border=4, upscale=True)
    collator, some = QuestionCollator(processor), items(colour_questions())[:3]
    ours, theirs = collator(some), pickle.loads(pickle.dumps(collator))(some)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tokenizer_that_ends_questions_is_refused() -> None:
    """Nothing behind an end token was ever trained."""
    from tokenizers.processors import TemplateProcessing

    processor = llava_processor()
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    some = items(colour_questions())[:1]
    with pytest.raises(DataError, match="puts its end token after every question"):
        QuestionCollator(processor)(some)
    assert QuestionCollator(processor, encoder_decoder=True)(some)["input_ids"][0, -1] == EOS


def test_answers_are_tokenised_apart_from_everything_else() -> None:
    """Formats and ends, and what cannot be tokenised."""
    tokenizer = mllm_tokenizer()
    assert answer_token_ids(tokenizer, ["ab"], answer_format=" {}.", end_token="</s>") == [[*ids(" ab."), EOS]]
    assert answer_token_ids(tokenizer, ["{}"]) == [ids("{}")]
    with pytest.raises(DataError, match="`answer_format` with one"):
        answer_token_ids(tokenizer, ["a"], answer_format="a")
    assert resolve_end_token(tokenizer, None) == "</s>"
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no end token"):
        resolve_end_token(tokenizer, None)


def test_a_collator_must_shrink_images_as_a_prompt_expects_them() -> None:
    """Shrunken twice, or not at all, every image would be wrong without a word."""

    def settings(shrink: str) -> PixelSettings:
        return PixelSettings(32, 4, "border", None, shrink, False, (0.5,) * 3, (0.5,) * 3)

    def shrinking(border: int = 4, canvas: int = 32) -> ShrinkingProcessor:
        return ShrinkingProcessor(llava_processor(), canvas_size=canvas, border=border)

    plain, shrunken = QuestionCollator(llava_processor()), QuestionCollator(shrinking(8, 64))
    for collator, shrink in ((plain, "model"), (plain, "none"), (shrunken, "processor"), (shrunken, "none")):
        check_shrinking(collator, settings(shrink))
    with pytest.raises(DataError, match="`processor` without `ShrinkingProcessor`"):
        check_shrinking(shrunken, settings("model"))
    with pytest.raises(DataError, match=r"got LlavaProcessor\. Give .*canvas_size=32, border=4"):
        check_shrinking(plain, settings("processor"))
    with pytest.raises(DataError, match="got canvas 32, border 5"):
        check_shrinking(QuestionCollator(shrinking(5)), settings("processor"))
    with pytest.raises(DataError, match="`clip_processor` that shrinks"):
        check_shrinking(QuestionCollator(shrinking(), clip_processor=clip_processor()), settings("processor"))


def test_a_processor_without_patch_size_is_refused() -> None:
    """LLaVA's processors of 2023 have none; the first batch failed with "unsupported operand NoneType"."""
    processor = llava_processor()
    processor.patch_size = None
    with pytest.raises(DataError, match="`LlavaProcessor` has no `patch_size`.*processor.patch_size = model.config"):
        QuestionCollator(processor)
