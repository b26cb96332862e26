"""Tiny adapters for the app: a base model in a folder, and an adapter on it that records classes and template."""

from pathlib import Path

import pytest

from peft_vlm.app.compare import Comparison, TestImages
from tests.hub.adapters import write_images
from tests.test_classifier import save_adapter
from tests.tiny import clip_processor, tiny_clip, tiny_tokenizer


@pytest.fixture(scope="session")
def app_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights."""
    folder = tmp_path_factory.mktemp("app")
    base = folder / "tiny-clip"
    tiny_clip().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    clip_processor().save_pretrained(base)
    return save_adapter(base, folder / "<b>skip")


@pytest.fixture(scope="session")
def comparison(app_adapter: Path) -> Comparison:
    """That adapter beside its base model."""
    return Comparison.load([str(app_adapter)], device="cpu")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> TestImages:
    """A folder of images in a few colours."""
    return TestImages.load(str(write_images(tmp_path_factory.mktemp("colours"))))
