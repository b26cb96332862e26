"""Templates and tokenised class lists: order, cut, padding, every refusal, and folders without a vocabulary."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer

from peft_vlm import CoOpConfig
from peft_vlm.errors import ClassNameError
from peft_vlm.text import IMAGENET_ENSEMBLE, ClassPrompts, check_class_names, fill, tokenize_classes
from peft_vlm.text.prompts import has_vocabulary, tokenizer_of
from tests.tiny import tiny_clip, tiny_tokenizer

START, END = 512, 513


def tokenized(names: list[str], template: str | list[str] = "a {}.", max_length: int = 40, **kwargs) -> ClassPrompts:
    """Prompts of the tiny tokenizer."""
    return tokenize_classes(tiny_tokenizer(), names, template=template, max_length=max_length, **kwargs)


def test_ids_equal_the_tokenizers_own_and_are_cut_to_the_longest() -> None:
    """A row that lost its end token would be pooled at the wrong position."""
    prompts = tokenized(["cat", "hamster"])
    assert prompts.input_ids.shape == (2, 1 + 1 + 7 + 1 + 1)  # start, "a", one token per letter, ".", end
    for row, text in zip(prompts.input_ids, ["a cat.", "a hamster."], strict=True):
        ids = tiny_tokenizer()(text)["input_ids"]
        assert row[: len(ids)].tolist() == ids
        assert set(row[len(ids) :].tolist()) <= {END}
        assert (ids[0], ids[-1]) == (START, END)


def test_rows_go_template_by_template() -> None:
    """`encode_classes` averages rows `t * classes + c`; class-major rows would mix the classes."""
    prompts = tokenized(["cat", "dog"], ["a {}.", "the {}!"])
    single = [tokenized([name], template).input_ids[0] for template in ("a {}.", "the {}!") for name in ("cat", "dog")]
    assert prompts.input_ids.shape[0] == 4
    for row, expected in zip(prompts.input_ids, single, strict=True):
        assert row[: len(expected)].tolist() == expected.tolist()


def test_padding_to_the_full_length_for_bidirectional_text_towers() -> None:
    """SigLIP attends to padding: a cut prompt has other features."""
    assert tokenized(["cat"], max_length=24, pad_to_max=True).input_ids.shape == (1, 24)


def test_a_prompt_that_is_too_long_names_the_class_and_the_limit() -> None:
    """Truncation would drop the end of the name, and CLIP's end token with it."""
    with pytest.raises(ClassNameError, match=r"'hippopotamus' in template 'a \{\}.' needs 16 tokens.*is 10. Shorten"):
        tokenized(["cat", "hippopotamus"], max_length=10)
    assert tokenized(["cat", "hippopotamus"], max_length=16).input_ids.shape == (2, 16)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one class name"),
        ("cat", "list of at least one class name, got 'cat'"),
        (["cat", " _"], "Class 1 has no name"),
        (["cat", None], "Class 1 has no name: got None"),
        (["sea_lion", "dog", "sea lion"], "Classes 0 and 2 have the same name 'sea lion'. Rename one"),
    ],
)
def test_class_names_that_no_classifier_can_use_are_refused(names: list[str], message: str) -> None:
    """Two equal names make one of the classes unreachable, and accuracy is lower without a visible reason."""
    with pytest.raises(ClassNameError, match=message):
        check_class_names(names)


def test_names_that_differ_in_case_only_are_refused() -> None:
    """CLIP's tokenizer lower-cases: both would get the same feature."""
    with pytest.raises(ClassNameError, match="'Crane' and 'crane' have the same tokens in template 'a {}.'"):
        tokenized(["Crane", "crane"])


def test_no_template_is_refused() -> None:
    """An empty ensemble has no average."""
    with pytest.raises(ClassNameError, match="at least one template"):
        tokenized(["cat"], [])


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path: Path) -> None:
    """`CLIPTokenizer.from_pretrained` of a folder without tokenizer files returns one that knows no word."""
    with pytest.raises(ClassNameError, match="vocabulary files were not found"):
        tokenize_classes(CLIPTokenizer.from_pretrained(tmp_path), ["cat"], template="a {}.", max_length=40)


def test_a_tokenizer_without_padding_token_is_refused() -> None:
    """`None` would surface as a TypeError deep inside torch."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ClassNameError, match="no padding token"):
        tokenize_classes(tokenizer, ["cat"], template="a {}.", max_length=40)


def test_prompts_compare_by_names_order_and_ids() -> None:
    """The cache relies on it: the same names under another template are other prompts."""
    prompts = tokenized(["cat", "dog"])
    assert prompts.is_same(tokenized(["cat", "dog"]))
    assert not prompts.is_same(tokenized(["dog", "cat"]))
    assert not prompts.is_same(tokenized(["cat", "dog"], "b {}."))
    assert not prompts.is_same(tokenized(["cat", "dog"], ["a {}.", "b {}."]))
    assert prompts.input_ids.dtype == torch.long


def test_underscores_and_doubled_spaces_become_one_space() -> None:
    """CoOp's class names come from folder names; an underscore would be a token of its own."""
    assert fill("a photo of a {}.", "annual_crop  land ") == "a photo of a annual crop land."


def test_other_braces_are_left_alone() -> None:
    """`str.format` would raise KeyError on a class name or template with braces."""
    assert fill("a {} in {braces}", "{set}") == "a {set} in {braces}"


@pytest.mark.parametrize(("template", "count"), [("a photo.", 0), ("{} and {}", 2)])
def test_a_template_has_one_place_for_the_name(template: str, count: int) -> None:
    """Without it every class would get the same text."""
    with pytest.raises(ClassNameError, match=f"exactly once in the template.*with {count}.*'a photo of a {{}}.'"):
        fill(template, "cat")


def test_the_ensemble_is_made_of_distinct_templates() -> None:
    """A template listed twice would count twice in the average."""
    assert len(set(IMAGENET_ENSEMBLE)) == 7
    assert all(fill(template, "cat") for template in IMAGENET_ENSEMBLE)


def test_words_are_not_read_with_a_tokenizer_that_has_no_vocabulary(tmp_path: Path) -> None:
    """Its ids would fill the context with one embedding, again and again, without a word."""
    tiny_clip().save_pretrained(tmp_path)
    assert not has_vocabulary(AutoTokenizer.from_pretrained(tmp_path))
    model = CLIPModel.from_pretrained(tmp_path)
    assert tokenizer_of(model) is None
    with pytest.raises(ValueError, match="has no tokenizer to read them"):
        get_peft_model(model, CoOpConfig(context_init="a photo of a"))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert has_vocabulary(tokenizer_of(model))
