"""A folder without vocabulary files has no tokenizer, whatever transformers builds for it."""

import pytest
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPModel

from peft_vlm import CoOpConfig
from peft_vlm.text.prompts import has_vocabulary, tokenizer_of
from tests.tiny import tiny_clip, tiny_tokenizer


def test_words_are_not_read_with_a_tokenizer_that_has_no_vocabulary(tmp_path):
    """Its ids would fill the context with one embedding, again and again, without a word."""
    tiny_clip().save_pretrained(tmp_path)
    assert not has_vocabulary(AutoTokenizer.from_pretrained(tmp_path))
    model = CLIPModel.from_pretrained(tmp_path)
    assert tokenizer_of(model) is None
    with pytest.raises(ValueError, match="has no tokenizer to read them"):
        get_peft_model(model, CoOpConfig(context_init="a photo of a"))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert has_vocabulary(tokenizer_of(model))
