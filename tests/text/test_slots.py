"""Slots for learned context in tokenised prompts: where they go, and when there is no room for them."""

import pytest
import torch
from peft import get_peft_model

from peft_vlm import CoOpConfig, PromptSRCConfig
from peft_vlm.errors import ClassNameError
from peft_vlm.text import ClassPrompts, encode_classes, reserve_slots, slots_of, tokenize_classes
from peft_vlm.text.prompts import slot_mask
from tests.tiny import CONTEXT_LENGTH, tiny_clip, tiny_tokenizer

START, END = 512, 513


def ids(text: str) -> list[int]:
    """Token ids of a text, without start and end."""
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def prompts(template: str = "a {}.", names: tuple[str, ...] = ("red", "green"), **settings) -> ClassPrompts:
    return tokenize_classes(tiny_tokenizer(), names, template=template, max_length=CONTEXT_LENGTH, **settings)


def coop(**settings) -> torch.nn.Module:
    return get_peft_model(tiny_clip(), CoOpConfig(**({"num_text_tokens": 4} | settings)))


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("end", [START, *[START] * 4, *ids("red"), *ids("."), END]),
        ("middle", [START, *[START] * 2, *ids("red"), *[START] * 2, *ids("."), END]),
        ("front", [START, *ids("red"), *[START] * 4, *ids("."), END]),
    ],
)
def test_places_by_position(position, expected):
    reserved = reserve_slots(coop(class_position=position), prompts("{}.", ("red",)))
    assert reserved.input_ids.tolist() == [expected]
    assert slot_mask(reserved.input_ids, START).sum().item() == 4
    assert reserved.slots is not None
    assert reserved.class_names == ("red",)


def test_an_odd_number_of_tokens_puts_the_larger_half_behind():
    """As the official `n_ctx // 2`."""
    reserved = reserve_slots(coop(num_text_tokens=3, class_position="middle"), prompts("{}", ("red",)))
    assert reserved.input_ids.tolist() == [[START, START, *ids("red"), START, START, END]]


def test_a_template_that_spells_the_context_words_gives_them_up():
    """Otherwise the words would stand in the prompt twice, once learned and once fixed."""
    model = coop(context_init="a ", context_init_ids=ids("a"))
    assert reserve_slots(model, prompts("a {}.", ("red",))).input_ids.tolist() == [[START, START, *ids("red."), END]]
    other = reserve_slots(model, prompts("one {}.", ("red",))).input_ids.tolist()
    assert other == [[START, START, *ids("one"), *ids("red."), END]]


def test_prompts_shorter_than_the_context_words_get_slots_in_front():
    """Short names in a short template ended in a shape error of torch."""
    words = ids("photo of a dog")
    model = coop(context_init="photo of a dog", context_init_ids=words, num_text_tokens=len(words))
    expected = [[START, *[START] * len(words), *ids("a"), END]]
    assert reserve_slots(model, prompts("{}", ("a",))).input_ids.tolist() == expected


def test_words_that_only_some_prompts_begin_with_stay():
    """Every prompt needs its slots at the same places: an ensemble keeps its words and gets slots in front."""
    model = coop(context_init_ids=ids("a"))
    reserved = reserve_slots(model, prompts(["a {}.", "the {}."], ("red",)))  # type: ignore[arg-type]
    assert reserved.input_ids[0, :4].tolist() == [START, START, *ids("a"), ids("red")[0]]
    assert slot_mask(reserved.input_ids, START).sum(dim=1).tolist() == [1, 1]


def test_fewer_vectors_than_words_leave_the_other_words_fixed():
    """As in the official code, where 2 vectors for 'a photo of a' leave 'of a' in the prompt."""
    words = ids("a b c")
    model = get_peft_model(
        tiny_clip(), PromptSRCConfig(num_text_tokens=2, text_depth=1, vision_depth=0, context_init_ids=words)
    )
    assert model.active_peft_config.context_init_ids == words[:2]
    reserved = reserve_slots(model, prompts("a b c {}", ("red",))).input_ids.tolist()
    assert reserved == [[START, START, START, words[2], *ids("red"), END]]


def test_prompts_stay_as_they_are_without_learned_context():
    plain = prompts()
    assert reserve_slots(tiny_clip(), plain) is plain
    model = coop()
    assert slots_of(model) == model.active_peft_config.slots
    with model.disable_adapter():
        assert reserve_slots(model, plain) is plain
        assert slots_of(model) is None
    vision = get_peft_model(tiny_clip(), PromptSRCConfig(num_text_tokens=0, vision_depth=2, num_vision_tokens=2))
    assert reserve_slots(vision, plain) is plain


def test_reserving_twice_is_reserving_once():
    model = coop()
    once = reserve_slots(model, prompts())
    assert reserve_slots(model, once) is once


def test_prompts_of_another_adapter_are_refused():
    with pytest.raises(ClassNameError, match="Expected plain class prompts or ones with Slots"):
        reserve_slots(coop(num_text_tokens=2), reserve_slots(coop(num_text_tokens=4), prompts()))
    with pytest.raises(ClassNameError, match="got prompts with Slots"):
        reserve_slots(tiny_clip(), reserve_slots(coop(), prompts()))


def test_a_prompt_that_gets_too_long_names_the_numbers():
    """The tokenizer would not notice: the slots come after it."""
    with pytest.raises(ClassNameError, match=r"needs 41 tokens with the 34 context tokens.*is 40. Shorten"):
        reserve_slots(coop(num_text_tokens=34), prompts("{}", ("green",)))
    assert reserve_slots(coop(num_text_tokens=33), prompts("{}", ("green",))).input_ids.shape == (1, 40)


@pytest.mark.parametrize("position", ["middle", "front"])
def test_other_positions_need_a_template_that_begins_with_the_name(position):
    with pytest.raises(ClassNameError, match=r"begins with the class name, such as '\{\}.'.*got \['a \{\}.'\]"):
        reserve_slots(coop(class_position=position), prompts("a {}."))
    unnamed = ClassPrompts(("red",), ("{}",), torch.tensor([[START, 1, END]]))
    with pytest.raises(ClassNameError, match="begins with the class name"):
        reserve_slots(coop(class_position=position), unnamed)


def test_class_features_are_computed_with_the_slots():
    """A plain prompt in front of learned context would be refused by the embedding, not silently overwritten."""
    model = coop().eval()
    expected = model.get_text_features(input_ids=reserve_slots(model, prompts()).input_ids).pooler_output.detach()
    features = encode_classes(model, prompts())
    assert torch.allclose(features, torch.nn.functional.normalize(expected, dim=-1), atol=1e-6)
