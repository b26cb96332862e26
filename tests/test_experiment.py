"""The comparison harness: two models on one set of class prompts."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from peft_vlm.errors import ClassNameError
from peft_vlm.experiment import Experiment
from tests.tiny import CONTEXT_LENGTH, clip_processor, tiny_clip, tiny_tokenizer


def saved_clip(folder: Path, tokenizer: PreTrainedTokenizerBase, *, length: int = CONTEXT_LENGTH) -> str:
    """A model folder without weights: configuration, tokenizer and image processor."""
    config = tiny_clip().config
    config.text_config.max_position_embeddings = length
    for part in (config, tokenizer, clip_processor()):
        part.save_pretrained(folder)
    return str(folder)


def test_two_models_that_read_one_set_of_prompts_need_one_vocabulary(tmp_path: Path) -> None:
    """The student's own rows would be scored on other words than it was asked for."""
    vocabulary = tiny_tokenizer().get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    student = saved_clip(tmp_path / "student", tiny_tokenizer())
    other = saved_clip(tmp_path / "other", CLIPTokenizer(vocab=vocabulary, merges=[]))
    with pytest.raises(ClassNameError, match=r"2 of 514 tokens differ: 'a' has the id \d+ in '.*student' and \d+ in"):
        Experiment.for_clip(student, text_model=other, augmentation={}, output_dir=tmp_path)


def test_the_shorter_text_tower_sets_the_length(tmp_path: Path) -> None:
    """A prompt that fits the teacher alone would fail in the middle of a run."""
    student = saved_clip(tmp_path / "student", tiny_tokenizer(), length=12)
    teacher = saved_clip(tmp_path / "teacher", tiny_tokenizer())
    experiment = Experiment.for_clip(student, text_model=teacher, augmentation={}, output_dir=tmp_path)
    assert experiment.max_length == 12
    assert experiment.prompts(["red", "blue"], "a {}.").input_ids.shape == (2, 8)
    with pytest.raises(ClassNameError, match="limit of the text tower is 12"):
        experiment.prompts(["hippopotamus"], "a {}.")
