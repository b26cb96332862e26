"""Images with questions and answers: where the answer comes from, labels, subsets, reproducible augmentation."""

import numpy as np
import pytest
import torch
from datasets import Dataset as HFDataset
from PIL import Image

from peft_vlm.data import ImageClassificationDataset, ImageQuestionDataset, RandomCrop
from peft_vlm.errors import DataError
from tests.tiny import colour_names, colour_rows, noise_image
from tests.tiny_questions import QUESTION, colour_questions


def test_class_names_are_the_answers() -> None:
    """Classification: the label's name is what the model shall write."""
    item = colour_questions()[5]
    assert (item["question"], item["answer"], item["labels"], item["index"]) == (QUESTION, "yellow", 2, 5)
    assert item["image"].mode == "RGB"


def test_answers_out_of_a_list_give_the_labels() -> None:
    """Yes/no tasks: the label is the answer's place, so that they score like classes."""
    rows = [
        {"image": noise_image(8, 8), "text": a, "about": f"Is it {n}?"} for n, a in enumerate(["yes", "no", "yes"])
    ]
    dataset = ImageQuestionDataset(rows, ["no", "yes"], question_column="about", answer_column="text")
    assert dataset.labels == [1, 0, 1]
    assert [dataset[i]["question"] for i in range(3)] == ["Is it 0?", "Is it 1?", "Is it 2?"]
    subset = dataset.select([2, 1])
    assert [(subset[i]["question"], subset[i]["answer"]) for i in range(2)] == [
        ("Is it 2?", "yes"),
        ("Is it 1?", "no"),
    ]
    with pytest.raises(DataError, match="Row 1 has the answer 'no', which is not among the 1 class names"):
        ImageQuestionDataset(rows, ["yes"], question_column="about", answer_column="text")


def test_free_answers_and_counts_have_no_label() -> None:
    """Numbers are written as text."""
    rows = [{"image": noise_image(8, 8), "count": 3}]
    item = ImageQuestionDataset(rows, question="How many?", answer_column="count")[0]
    assert (item["answer"], item["labels"]) == ("3", -1)


def test_images_without_answers_have_none() -> None:
    """For prediction on new images."""
    dataset = ImageQuestionDataset([{"image": noise_image(8, 8)}], ["a", "b"], question=QUESTION)
    assert (dataset[0]["answer"], dataset[0]["labels"]) == (None, -1)


def test_hf_datasets_and_labelled_images_give_the_same_items() -> None:
    """Whatever `load_image_dataset` opens can be asked about."""
    rows = colour_rows(1)
    table = HFDataset.from_dict({"image": [row["image"] for row in rows], "label": [row["label"] for row in rows]})
    direct = ImageQuestionDataset(table, colour_names(), label_column="label", question=QUESTION)
    images = ImageClassificationDataset(table, colour_names(), seed=3).select([4, 2])
    through = ImageQuestionDataset.from_images(images, question=QUESTION)
    assert len(direct) == 6
    assert (len(through), through.seed, through.labels) == (2, 3, [4, 2])
    for position, row in enumerate([4, 2]):
        np.testing.assert_array_equal(np.asarray(through[position]["image"]), np.asarray(direct[row]["image"]))
        assert through[position]["answer"] == direct[row]["answer"] == colour_names()[row]
    through.set_epoch(4)
    assert images.epoch == 0, "the epoch of the labelled images must not move along"


def test_restriction_relabels_and_renames() -> None:
    """Base and new classes: the answer follows the new label."""
    dataset = colour_questions(1).restrict([5, 0])
    assert sorted((dataset[i]["labels"], dataset[i]["answer"]) for i in range(2)) == [(0, "purple"), (1, "red")]


def test_augmentation_depends_on_seed_epoch_and_position_alone() -> None:
    """A resumed run must see the same images; evaluation data must not change at all."""

    def pixels(dataset: ImageQuestionDataset) -> np.ndarray:
        return np.asarray(dataset[3]["image"])

    plain = colour_questions()
    crop = RandomCrop(scale=(0.2, 0.6), size=(12, 10))
    first, again = plain.with_augmentation(crop), plain.with_augmentation(crop)
    assert pixels(first).shape == (12, 10, 3)
    np.testing.assert_array_equal(pixels(first), pixels(again))
    again.set_epoch(1)
    assert (pixels(first) != pixels(again)).any()
    assert plain.has_fixed_pixels
    assert not first.has_fixed_pixels
    assert plain.augmentation is None


def test_a_mirror_is_a_mirror() -> None:
    """The crop of the whole image leaves it as it is, up to mirroring."""
    image = noise_image(9, 7)
    whole = RandomCrop(scale=(1.0, 1.0), ratio=(9 / 7, 9 / 7), flip_probability=1.0)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_array_equal(np.asarray(whole(image, torch.Generator())), np.asarray(mirrored))
    with pytest.raises(ValueError, match="flip_probability"):
        RandomCrop(flip_probability=1.5)
    with pytest.raises(ValueError, match="`scale` as .smallest, largest."):
        RandomCrop(scale=(0.0, 1.0))


def test_a_question_is_given_once() -> None:
    """Neither none nor two."""
    rows = colour_rows(1)
    with pytest.raises(DataError, match="either `question` or `question_column`, got None and None"):
        ImageQuestionDataset(rows, colour_names(), label_column="label")
    with pytest.raises(DataError, match="columns .'about'."):
        ImageQuestionDataset(rows, colour_names(), label_column="label", question_column="about")
    with pytest.raises(DataError, match="Expected texts or integers in column 'image'"):
        ImageQuestionDataset(rows, colour_names(), label_column="label", question_column="image")


def test_a_batch_needs_a_collator() -> None:
    """The error says what to set."""
    dataset = colour_questions().with_collator(None)
    with pytest.raises(DataError, match=r"Set `dataset.collator`"):
        dataset.collate([dataset[0]])
