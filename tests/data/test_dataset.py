"""The dataset: order, relabelling, reproducible augmentation, flat memory, named failures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset as HFDataset
from PIL import Image
from torch.utils.data import DataLoader

from peft_vlm.data import EvalTransform, ImageClassificationDataset, TrainTransform, collate
from peft_vlm.errors import DataError
from tests.tiny import clip_processor, colour_names, colour_rows, noise_image


def colours(per_class: int = 3, **options: Any) -> ImageClassificationDataset:
    """Six colours, class by class."""
    return ImageClassificationDataset(colour_rows(per_class), colour_names(), **options)


def augmented(seed: int = 0) -> ImageClassificationDataset:
    """Colours under random crops."""
    return colours(transform=TrainTransform(clip_processor()), seed=seed)


def pixels(dataset: ImageClassificationDataset, **loader: Any) -> torch.Tensor:
    """All pixel values in order."""
    batches = DataLoader(dataset, batch_size=4, collate_fn=collate, **loader)
    return torch.cat([batch["pixel_values"] for batch in batches])


def test_items_hold_pixels_label_and_position() -> None:
    """Caches use `index` as their key."""
    dataset = colours(transform=EvalTransform(clip_processor()))
    item = dataset[7]
    assert (item["labels"], item["index"], len(dataset)) == (2, 7, 18)
    expected = clip_processor()(dataset.image(7), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(item["pixel_values"], expected)


def test_an_hf_dataset_gives_the_same_items() -> None:
    """Images stored by `datasets` as PNG bytes are the same images."""
    rows = colour_rows(2)
    table = HFDataset.from_dict({"picture": [row["image"] for row in rows], "class": [row["label"] for row in rows]})
    dataset = ImageClassificationDataset(table, colour_names(), image_column="picture", label_column="class")
    assert dataset.labels == [row["label"] for row in rows]
    assert type(dataset.labels[0]) is int
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(dataset.image(index)), np.asarray(row["image"]))


def test_transparent_images_reach_the_processor_over_white() -> None:
    """The processors of transformers 5 lay them over white too; both ways must give the same pixels."""
    image = noise_image(20, 20, mode="RGBA")
    transform = EvalTransform(clip_processor())
    dataset = ImageClassificationDataset([{"image": image, "label": 0}], ["x"], transform=transform)
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert torch.equal(dataset[0]["pixel_values"], transform(white))
    assert torch.equal(dataset[0]["pixel_values"], transform(image))


def test_select_keeps_labels_and_order() -> None:
    """Positions may repeat, and a selection of a selection refers to the first."""
    dataset = colours().select([17, 3, 3, 0])
    assert dataset.labels == [5, 1, 1, 0]
    again = dataset.select([1, 0])
    assert again.labels == [1, 5]
    np.testing.assert_array_equal(np.asarray(again.image(0)), np.asarray(colours().image(3)))
    assert again.class_names == colour_names()


def test_restrict_relabels_in_the_given_order() -> None:
    """Base-to-new needs labels from 0 that index the restricted names."""
    dataset = colours(2).restrict([4, 1])
    assert dataset.class_names == ("blue", "orange")
    assert dataset.labels == [1, 1, 0, 0]
    np.testing.assert_array_equal(np.asarray(dataset.image(2)), np.asarray(colours(2).image(8)))
    assert dataset.restrict([1]).class_names == ("orange",)


def test_groups_follow_a_column_of_the_source() -> None:
    """Domains in a subset: the column is read at the rows the subset stands for."""
    rows = [row | {"domain": ("flat", "3d")[index % 2]} for index, row in enumerate(colour_rows(3))]
    groups = ImageClassificationDataset(rows, colour_names()).select([0, 1, 5, 17]).group_by("domain")
    assert {name: group.labels for name, group in groups.items()} == {"3d": [0, 1, 5], "flat": [0]}
    assert groups["flat"].class_names == colour_names()
    with pytest.raises(DataError, match="columns .'style'."):
        colours().group_by("style")


def test_with_transform_leaves_the_dataset_alone() -> None:
    """Training and evaluation share images; setting `transform` on one must not reach the other."""
    dataset = augmented()
    assert isinstance(dataset.with_transform(EvalTransform(clip_processor())).transform, EvalTransform)
    assert isinstance(dataset.transform, TrainTransform)


def test_augmentation_depends_on_seed_epoch_and_position_alone() -> None:
    """What makes a resumed run see the same images."""
    first = pixels(augmented())
    assert torch.equal(pixels(augmented()), first)
    assert not torch.equal(pixels(augmented(seed=1)), first)
    later = augmented()
    later.set_epoch(1)
    assert not torch.equal(pixels(later), first)
    later.set_epoch(0)
    assert torch.equal(pixels(later), first)
    assert torch.equal(later[5]["pixel_values"], first[5]), "the order of access must not matter"


def test_running_workers_see_the_new_epoch() -> None:
    """Persistent workers keep a copy of the dataset; a plain attribute would freeze the augmentation at epoch 0."""
    dataset = augmented()
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader = DataLoader(dataset, batch_size=9, collate_fn=collate, **options)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        expected = augmented()
        expected.set_epoch(epoch)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), pixels(expected))


def test_subsets_have_their_own_epoch() -> None:
    """Evaluating one subset must not move another."""
    dataset = augmented()
    subset = dataset.select([0])
    dataset.set_epoch(2)
    assert (dataset.epoch, subset.epoch, dataset.select([0]).epoch) == (2, 0, 2)


def test_without_pixels_reads_no_image() -> None:
    """Epochs on stored features must not open files."""
    rows = [{"image": "/no/such/file.png", "label": 1}, {"image": "/no/such/file.png", "label": 0}]
    dataset = ImageClassificationDataset(rows, ["a", "b"]).without_pixels()
    assert len(dataset) == 2
    batch = collate([dataset[0], dataset[1]])
    assert set(batch) == {"labels", "index"}
    assert batch["labels"].tolist() == [1, 0]
    assert batch["index"].tolist() == [0, 1]


def test_nothing_is_kept_in_memory(tmp_path: Path) -> None:
    """Files are opened per access: a dataset larger than memory works."""
    path = tmp_path / "image.png"
    noise_image(8, 8).save(path)
    dataset = ImageClassificationDataset([{"image": str(path), "label": 0}], ["a"])
    first = dataset.image(0)
    noise_image(8, 8, seed=1).save(path)
    assert np.any(np.asarray(first) != np.asarray(dataset.image(0)))


def test_a_damaged_image_names_position_row_and_file(tmp_path: Path) -> None:
    """In a subset the position differs from the row of the source; the file is what the user can repair."""
    path = tmp_path / "broken picture.jpg"
    path.write_bytes(b"no image")
    rows = [{"image": noise_image(4, 4), "label": 0}, {"image": str(path), "label": 0}]
    dataset = ImageClassificationDataset(rows, ["a"], transform=EvalTransform(clip_processor())).select([1])
    with pytest.raises(
        DataError, match=r"image 0 \(row 1 of the source\) \(file '.*broken picture.jpg'\) cannot be read"
    ):
        dataset[0]


def test_an_item_needs_a_transform() -> None:
    """Images of different sizes cannot be stacked."""
    with pytest.raises(DataError, match="Set `dataset.transform`.*EvalTransform"):
        colours()[0]


class KeepSize:
    """A transform that leaves images at their size."""

    image_size, image_mean, image_std = (0, 0), (0.0,) * 3, (1.0,) * 3

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """Pixels in [0, 1]."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_images_of_different_sizes_are_explained() -> None:
    """`torch.stack` would name shapes but no remedy."""
    rows = [{"image": noise_image(4, 4), "label": 0}, {"image": noise_image(5, 4), "label": 0}]
    dataset = ImageClassificationDataset(rows, ["a"], transform=KeepSize())
    with pytest.raises(DataError, match=r"one size, got \[\(3, 4, 4\), \(3, 4, 5\)\].*EvalTransform"):
        collate([dataset[0], dataset[1]])


@pytest.mark.parametrize("label", [-1, 2, None, 1.0, "a"])
def test_labels_must_index_the_class_names(label: object) -> None:
    """-1 is how unlabelled test sets are stored; as an index it would mean the last class."""
    rows = [{"image": noise_image(4, 4), "label": 0}, {"image": noise_image(4, 4), "label": label}]
    with pytest.raises(DataError, match=f"labels from 0 to 1 for 2 class names, got {label!r} at image 1"):
        ImageClassificationDataset(rows, ["a", "b"])


def test_missing_columns_and_empty_sources_are_explained() -> None:
    """The message lists what there is."""
    with pytest.raises(
        DataError, match=r"columns \['image', 'label'\], got \['image', 'fine_label'\].*`label_column`"
    ):
        ImageClassificationDataset([{"image": noise_image(4, 4), "fine_label": 0}], ["a"])
    with pytest.raises(DataError, match="no rows"):
        ImageClassificationDataset([], ["a"])


def test_positions_and_classes_out_of_range_are_refused() -> None:
    """A negative position would silently count from the end."""
    with pytest.raises(DataError, match=r"positions from 0 to 17, got \[-1, 18\]"):
        colours().select([-1, 2, 18])
    for wrong in ([0, 6], [0, 0]):
        with pytest.raises(DataError, match="different class ids from 0 to 5"):
            colours().restrict(wrong)
