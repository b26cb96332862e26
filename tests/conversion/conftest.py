"""Base models of the recorded checkpoints as folders, made once."""

import pytest
from transformers import CLIPImageProcessor

from tests.parity.recorded import recorded_clip, recorded_tokenizer


def saved(name: str, folder, *, image_size: int):
    """A recorded CLIP as a folder, with the recorded tokenizer."""
    recorded_clip(name).save_pretrained(folder)
    recorded_tokenizer().save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    """The CLIP of CoOp, PromptSRC and the PromptKD student."""
    return saved("weights_student", tmp_path_factory.mktemp("student") / "clip", image_size=32)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """The larger CLIP of the PromptKD teacher."""
    return saved("weights_teacher", tmp_path_factory.mktemp("teacher") / "clip", image_size=32)


@pytest.fixture(scope="session")
def skip_folder(tmp_path_factory):
    """The CLIP of Skip Tuning, without a tokenizer."""
    folder = tmp_path_factory.mktemp("skip") / "clip"
    recorded_clip("tiny_clip").save_pretrained(folder)
    return folder
