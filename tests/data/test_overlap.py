"""Test images that were trained on are found by their content."""

import logging
from pathlib import Path

import numpy as np
import pytest

from peft_vlm.data import ImageClassificationDataset, load_image_dataset
from peft_vlm.data.splits import check_not_trained_on, image_sample
from peft_vlm.errors import DataError
from tests.tiny import noise_image


def images(*numbers: int) -> ImageClassificationDataset:
    """Images that their numbers tell apart, in memory."""
    return ImageClassificationDataset(
        [{"image": np.full((4, 4, 3), number, np.uint8), "label": 0} for number in numbers], ["a", "b"]
    )


def check(train: ImageClassificationDataset, test: ImageClassificationDataset, **options: bool) -> None:
    """The comparison that runs make."""
    check_not_trained_on(test, image_sample(train), num_train=len(train), **options)


def test_a_test_set_of_training_images_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Half of either: a copy, a part of the training images, or a set that holds them all."""
    train = images(*range(10))
    for test in (train, images(3, 4), images(*range(200)), images(0, 1, 100)):
        with pytest.raises(DataError, match="of the test images are training images, byte for byte.*another split"):
            check(train, test)
    check(train, images(100, 101))
    assert not caplog.text
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        check(train, images(1, *range(100, 109)))
        check(train, train, refuse=False)
    assert "About 10 % of the test images" in caplog.text
    assert "About 100 % of the test images" in caplog.text


def test_files_are_compared_by_content(tmp_path: Path) -> None:
    """A copy under another name is the same image."""
    for split in ("train", "test"):
        for label in "ab":
            path = tmp_path / split / label / f"{split}.png"
            path.parent.mkdir(parents=True)
            noise_image(8, 8, seed=ord(label)).save(path)
    train, test = (load_image_dataset(tmp_path, split=split) for split in ("train", "test"))
    with pytest.raises(DataError, match="100 % of the test images"):
        check(train, test)


def test_a_sample_of_many_training_images_is_enough() -> None:
    """A hundred thousand files need not be read twice."""
    train = images(*(number % 250 for number in range(1000)))
    assert len(image_sample(train)) <= 256
    with pytest.raises(DataError, match="of the test images"):
        check(train, images(*range(0, 250, 4)))
