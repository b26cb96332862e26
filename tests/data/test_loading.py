"""Every way to hand in labelled images, and what each says when it does not fit."""

import csv
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import (
    ClassLabel,
    DatasetDict,
    Features,
    IterableDatasetDict,
    NamedSplit,
    Value,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature
from PIL import Image

from peft_vlm.data import load_image_dataset, load_image_stream, read_class_names
from peft_vlm.errors import DataError
from tests.tiny import colour_names, colour_rows, noise_image

NAMES = list(colour_names(3))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`datasets` copies parquet files to its cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    disable_progress_bars()
    yield
    enable_progress_bars()


def table(per_class: int = 2, label: str = "ids") -> HFDataset:
    """Three colours with `ClassLabel`, plain ids, or names as labels, and a domain."""
    rows = colour_rows(per_class, classes=3)
    feature = {"ids": Value("int64"), "names": Value("string"), "classes": ClassLabel(names=NAMES)}[label]
    columns = {
        "image": [row["image"] for row in rows],
        "label": [NAMES[row["label"]] if label == "names" else row["label"] for row in rows],
        "domain": [("plain", "pixel")[row % 2] for row in range(len(rows))],
    }
    features = Features({"image": ImageFeature(), "label": feature, "domain": Value("string")})
    return HFDataset.from_dict(columns, features=features)


def write_images(folder: Path, *files: str) -> None:
    """Tiny images at relative paths."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        noise_image(4, 4).save(folder / file)


def test_class_label_names_are_used() -> None:
    """The usual case on the Hub."""
    dataset = load_image_dataset(table(label="classes"))
    assert dataset.class_names == tuple(NAMES)
    assert dataset.labels == [0, 0, 1, 1, 2, 2]
    assert dataset.image(5).size == (20, 20)


def test_class_names_replace_those_of_the_dataset() -> None:
    """Raw names are often codes; a mapping or a list in label order renames them."""
    renamed = load_image_dataset(table(label="classes"), class_names={"red": "r", "orange": "o", "yellow": "y"})
    assert renamed.class_names == load_image_dataset(table(label="classes"), class_names=["r", "o", "y"]).class_names
    with pytest.raises(DataError, match="Expected 3 class names, one per label of the dataset, got 2"):
        load_image_dataset(table(label="classes"), class_names=["r", "o"])
    with pytest.raises(DataError, match="lacks 1 labels, the first is 'yellow'"):
        load_image_dataset(table(label="classes"), class_names={"red": "r", "orange": "o"})


def test_plain_ids_need_names() -> None:
    """A prompt needs words."""
    assert load_image_dataset(table(), class_names=NAMES).class_names == tuple(NAMES)
    with pytest.raises(DataError, match="'label' are numbers without names. Pass `class_names`"):
        load_image_dataset(table())
    with pytest.raises(DataError, match="labels from 0 to 1 for 2 class names, got 2 at image 4"):
        load_image_dataset(table(), class_names=NAMES[:2])


def test_string_labels_become_ids() -> None:
    """In sorted order, or in the order of the names given."""
    dataset = load_image_dataset(table(label="names"))
    assert (dataset.class_names, dataset.labels) == (("orange", "red", "yellow"), [1, 1, 0, 0, 2, 2])
    assert load_image_dataset(table(label="names"), class_names=["blue", *NAMES]).labels == [1, 1, 2, 2, 3, 3]


def test_a_dataset_dict_needs_the_split() -> None:
    """The message lists the splits."""
    source = DatasetDict({"train": table(label="classes"), "test": table(1, label="classes").select(range(2))})
    assert len(load_image_dataset(source, split="test")) == 2
    with pytest.raises(DataError, match=r"splits \['test', 'train'\], got `split`='val'"):
        load_image_dataset(source, split="val")


@pytest.mark.parametrize("load", [load_image_dataset, load_image_stream])
def test_a_single_dataset_answers_only_to_its_own_split(load: Callable) -> None:
    """Twelve training images were called a test set; a dataset from the Hub knows which split it is."""
    options = {"num_images": 6} if load is load_image_stream else {}
    unnamed, named = table(label="classes"), table(label="classes")
    named._split = NamedSplit("test[:50%]")
    for source, own in ((unnamed, "train"), (named, "test")):
        assert len(load(source, **options)) == len(load(source, split=own, **options)) == 6
        for other in {"train", "test", "nonsense"} - {own}:
            with pytest.raises(DataError, match=rf"splits \['{own}'\], got `split`='{other}'. Leave out `split`"):
                load(source, split=other, **options)


def test_the_only_split_of_a_source_needs_no_name() -> None:
    """`train` is asked for where there are several."""
    only = DatasetDict({"test": table(label="classes")})
    assert len(load_image_dataset(only)) == 6
    with pytest.raises(DataError, match=r"splits \['test'\], got `split`='train'"):
        load_image_dataset(only, split="train")
    assert len(load_image_stream(only, num_images=6)) == 6
    with pytest.raises(DataError, match=r"splits \['test'\], got `split`='train'"):
        load_image_stream(only, split="train", num_images=6)


def test_streams_and_other_rows_name_the_function_that_takes_them() -> None:
    """They failed later, with an AttributeError."""
    stream = table(label="classes").to_iterable_dataset()
    for source in (stream, IterableDatasetDict({"train": stream})):
        with pytest.raises(DataError, match=r"got a stream \(`IterableDataset`\).*Use `load_image_stream`"):
            load_image_dataset(source)
    with pytest.raises(DataError, match=r"got \['list'\]. Make one with `datasets.Dataset.from_list`"):
        load_image_dataset([{"image": noise_image(4, 4), "label": 0}])


def test_images_in_archives_are_opened_as_datasets_does(tmp_path: Path) -> None:
    """`datasets` lets such paths in; they failed in the first batch."""
    write_images(tmp_path, "0.png", "1.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(2):
            archive.write(tmp_path / f"{number}.png", f"inside/{number}.png")
    paths = [f"zip://inside/{number}.png::{tmp_path / 'images.zip'}" for number in range(2)]
    columns = {"image": paths, "label": [0, 1]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    dataset = load_image_dataset(HFDataset.from_dict(columns, features=features))
    rows = (("image", "label"), ("zip://inside/0.png::images.zip", "cat"), ("zip://inside/1.png::images.zip", "dog"))
    listed = load_image_dataset(write_csv(tmp_path / "list.csv", *rows))
    for number in range(2):
        expected = np.asarray(Image.open(tmp_path / f"{number}.png"))
        np.testing.assert_array_equal(np.asarray(dataset.image(number)), expected)
        np.testing.assert_array_equal(np.asarray(listed.image(number)), expected)
    rows = (("image", "label"), ("zip://0.png::gone.zip", "cat"))
    with pytest.raises(DataError, match="1 of 1 image files are missing"):
        load_image_dataset(write_csv(tmp_path / "list.csv", *rows))


def test_a_parquet_file_is_the_split_that_it_is_named_after(tmp_path: Path) -> None:
    """It was taken for the id of a dataset on the Hub."""
    table(label="classes").to_parquet(tmp_path / "test.parquet")
    assert len(load_image_dataset(tmp_path / "test.parquet", split="test")) == 6
    with pytest.raises(DataError, match=r"splits \['test'\], got `split`='train'"):
        load_image_dataset(tmp_path / "test.parquet", split="train")


def test_where_keeps_rows_by_value() -> None:
    """Domains live in a column; an unknown one must not give an empty evaluation."""
    dataset = load_image_dataset(table(label="classes"), where={"domain": "pixel"})
    assert dataset.labels == [0, 1, 2]
    with pytest.raises(DataError, match=r"No row has 'hand' in column 'domain', which holds \['pixel', 'plain'\]"):
        load_image_dataset(table(label="classes"), where={"domain": "hand"})
    with pytest.raises(DataError, match="got .*'domain'"):
        load_image_dataset(table(label="classes"), where={"style": "flat"})


@pytest.mark.parametrize("layout", ["{split}.parquet", "data/{split}-00000-of-00001.parquet"])
def test_parquet_folders_hold_one_file_per_split(tmp_path: Path, layout: str) -> None:
    """Flat, or as the Hub lays them out; class names travel in the file."""
    folder = tmp_path / "my data"
    for split, per_class in (("train", 2), ("test", 1)):
        path = folder / layout.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        table(4, label="classes").select(range(per_class)).to_parquet(path)
    dataset = load_image_dataset(folder, split="test")
    assert (len(dataset), dataset.class_names) == (1, tuple(NAMES))
    assert len(load_image_dataset(str(folder))) == 2
    with pytest.raises(DataError, match=r"splits \['test', 'train'\], got `split`='val'"):
        load_image_dataset(folder, split="val")


def test_folders_of_save_to_disk_are_opened(tmp_path: Path) -> None:
    """Both a single dataset and a dictionary of splits."""
    table(label="classes").save_to_disk(tmp_path / "one")
    DatasetDict({"test": table(label="classes")}).save_to_disk(tmp_path / "two")
    assert len(load_image_dataset(tmp_path / "one")) == len(load_image_dataset(tmp_path / "two", split="test")) == 6


def test_image_folders_with_splits(tmp_path: Path) -> None:
    """Labels come from all splits together: a class missing in one must not shift the ids of the other."""
    write_images(
        tmp_path, "train/cat/2.png", "train/cat/1.JPG", "train/ox/deep/1.png", "test/bee/1.png", "test/ox/1.webp"
    )
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    write_images(tmp_path, "train/cat/.hidden.png")
    train, test = load_image_dataset(tmp_path), load_image_dataset(tmp_path, split="test")
    assert train.class_names == test.class_names == ("bee", "cat", "ox")
    assert (train.labels, test.labels) == ([1, 1, 2], [0, 2])
    assert train.image(2).size == (4, 4)
    with pytest.raises(DataError, match=r"splits \['test', 'train'\], got `split`='val'"):
        load_image_dataset(tmp_path, split="val")


def test_image_folders_without_splits_are_the_training_split(tmp_path: Path) -> None:
    """Testing on it must be said, not guessed."""
    write_images(tmp_path, "n02/1.png", "n01/1.png")
    assert load_image_dataset(tmp_path, class_names={"n01": "tench", "n02": "shark"}).class_names == ("tench", "shark")
    assert load_image_dataset(tmp_path, class_names=["tench", "shark"]).labels == [0, 1]
    with pytest.raises(
        DataError, match="got `split`='test'. It has no split folders, so all of it is the split 'train'. Make"
    ):
        load_image_dataset(tmp_path, split="test")
    with pytest.raises(DataError, match="2 of 2 labels are not among the 3 class names, the first is 'n01'"):
        load_image_dataset(tmp_path, class_names=["a", "b", "c"])
    with pytest.raises(DataError, match="`where` needs a dataset with columns"):
        load_image_dataset(tmp_path, where={"domain": "x"})


def test_numbered_folders_are_ids(tmp_path: Path) -> None:
    """Sorted as text, '10' comes before '2': ImageNet-V2's classes would be shuffled."""
    write_images(tmp_path, *(f"{number}/1.png" for number in range(12)))
    names = [f"class {number}" for number in range(12)]
    dataset = load_image_dataset(tmp_path, class_names=names)
    assert [dataset.class_names[label] for label in dataset.labels] == names
    assert dataset.source[10]["image"] == str(tmp_path / "10/1.png")
    with pytest.raises(DataError, match="labels are numbers without names"):
        load_image_dataset(tmp_path)


def test_empty_folders_are_explained(tmp_path: Path) -> None:
    """The common mistake is one level too high or too low."""
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="No images in .*one folder per class"):
        load_image_dataset(tmp_path)


def write_csv(path: Path, *rows: tuple[str, ...]) -> Path:
    """A CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_csv_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """Names as labels, quoted cells, another column order."""
    write_images(tmp_path, "a b.png", "sub/c.png")
    rows = (("id", "label", "image"), ("1", "sea lion, big", "a b.png"), ("2", "ox", "sub/c.png"))
    dataset = load_image_dataset(write_csv(tmp_path / "list.csv", *rows))
    assert (dataset.class_names, dataset.labels) == (("ox", "sea lion, big"), [1, 0])
    assert dataset.image(0).size == (4, 4)


def test_csv_ids_index_the_class_names(tmp_path: Path) -> None:
    """A class without images keeps its place."""
    write_images(tmp_path, "a.png")
    path = write_csv(tmp_path / "list.csv", ("file", "y"), ("a.png", "2"), ("a.png", "0"))
    dataset = load_image_dataset(path, image_column="file", label_column="y", class_names=NAMES)
    assert (dataset.class_names, dataset.labels) == (tuple(NAMES), [2, 0])


def test_a_csv_file_without_splits_is_not_a_test_set(tmp_path: Path) -> None:
    """Training images that answer to the name "test" would be scored as if they had not been seen."""
    write_images(tmp_path, "a.png", "b.png", "c.png")
    rows = (("image", "label"), ("a.png", "cat"), ("b.png", "dog"))
    path = write_csv(tmp_path / "list.csv", *rows)
    assert load_image_dataset(path).labels == [0, 1]
    with pytest.raises(DataError, match=r"has the splits \['train'\], got `split`='test'. A column 'split' says"):
        load_image_dataset(path, split="test")
    rows = (
        ("image", "label", "split"),
        ("a.png", "dog", "train"),
        ("b.png", "cat", "train"),
        ("c.png", "dog", "test"),
    )
    path = write_csv(tmp_path / "parts.csv", *rows)
    assert load_image_dataset(path, split="train").labels == [1, 0]
    test = load_image_dataset(path, split="test")
    assert (test.class_names, test.labels) == (("cat", "dog"), [1])
    with pytest.raises(DataError, match=r"has the splits \['test', 'train'\], got `split`='val'.$"):
        load_image_dataset(path, split="val")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((("a.png", "cat"),), r"columns \['image', 'label'\] in .*got \['a.png', 'cat'\]. Add a header"),
        ((("image", "label"), ("a.png", "")), "Line 2 of .* has no image, no label or no split"),
        ((("image", "label"), ("a.png", "cat"), ("b.png", "cat")), "1 of 2 image files are missing.*b.png"),
        ((("image", "label"),), "no rows"),
        ((("image", "label", "label"), ("a.png", "cat", "dog")), r"each column once in .*got \['label'\] more than"),
        ((("image", "label"), ("a.png", " ")), "Line 2 of .* has no image, no label or no split"),
    ],
)
def test_csv_files_that_do_not_fit_are_explained(tmp_path: Path, rows: tuple, message: str) -> None:
    """Line and column, not a KeyError."""
    write_images(tmp_path, "a.png")
    with pytest.raises(DataError, match=message):
        load_image_dataset(write_csv(tmp_path / "list.csv", *rows))


@pytest.mark.parametrize("source", ["./no/such/folder", "data/pets/images", "list.csv"])
def test_a_wrong_path_is_not_taken_for_a_hub_id(source: str) -> None:
    """A typo must not end in a network error."""
    with pytest.raises(DataError, match="There is no '.*Relative paths start from"):
        load_image_dataset(source)


def test_a_hub_id_without_network_is_explained() -> None:
    """Tests run offline; the message names the id and the ways out."""
    with pytest.raises(DataError, match="'nobody/nothing' is no file or folder here.*Check the spelling, the network"):
        load_image_dataset("nobody/nothing")


def test_class_names_from_files(tmp_path: Path) -> None:
    """One per line, JSON list or mapping, and CoOp's ImageNet list."""
    files = {
        "names.txt": ("red\n\n orange\nyellow\n", NAMES),
        "names.json": (json.dumps(NAMES), NAMES),
        "map.json": (json.dumps({"n1": "red"}), {"n1": "red"}),
        "classnames.txt": (
            "n01440764 tench\nn01443537 goldfish bowl\n",
            {"n01440764": "tench", "n01443537": "goldfish bowl"},
        ),
    }
    for name, (text, expected) in files.items():
        (tmp_path / name).write_text(text)
        assert read_class_names(tmp_path / name) == expected
    assert load_image_dataset(table(), class_names=tmp_path / "names.txt").class_names == tuple(NAMES)
    (tmp_path / "wrong.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="list of names, or a mapping"):
        read_class_names(tmp_path / "wrong.json")
    with pytest.raises(DataError, match="There is no"):
        read_class_names(tmp_path / "gone.txt")


def test_a_hub_dataset_is_asked_for_by_configuration_revision_and_token(monkeypatch) -> None:
    """Without them a dataset of several configurations, or a private one, cannot be loaded at all."""
    asked = []

    def load_dataset(path, split=None, streaming=False, **place):
        asked.append((path, split, place))
        return datasets.Dataset.from_list(colour_rows(1)).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    place = {"config_name": "small", "revision": "v2", "token": "hf_x"}
    assert len(load_image_dataset("me/colours", split="train", class_names=list(colour_names()), **place)) == 6
    assert asked[0] == ("me/colours", "train", {"name": "small", "revision": "v2", "token": "hf_x"})


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_test_that_is_drawn_is_stratified_repeatable_and_apart(tmp_path, share) -> None:
    """Images in both parts would be a test on training images; a class without any would not be tested."""
    for label, count in (("a", 10), ("b", 4), ("c", 1)):
        (tmp_path / label).mkdir()
        for number in range(count):
            noise_image(8, 8, seed=number).save(tmp_path / label / f"{number}.png")
    parts = {
        split: load_image_dataset(tmp_path, split=split, holdout=share, class_names=["a", "b", "c"])
        for split in ("train", "test")
    }
    files = {split: [part.path_of(index) for index in range(len(part))] for split, part in parts.items()}
    assert len(files["train"]) + len(files["test"]) == 15
    assert not set(files["train"]) & set(files["test"])
    counts = [parts["test"].labels.count(label) for label in range(3)]
    assert counts == [round(10 * share), max(1, round(4 * share)), 0]
    again = load_image_dataset(tmp_path, split="test", holdout=share, class_names=["a", "b", "c"])
    assert [again.path_of(index) for index in range(len(again))] == files["test"]
    assert len(load_image_dataset(tmp_path, split="train", class_names=["a", "b", "c"])) == 15, "as before without it"
    with pytest.raises(DataError, match="`holdout` from 0 to below 1"):
        load_image_dataset(tmp_path, split="train", holdout=1.0)
