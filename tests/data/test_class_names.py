"""Labels are matched by name wherever names are known; the class list is that of the whole source."""

import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Features, Value
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature

from peft_vlm.data import (
    EvalTransform,
    ImageClassificationDataset,
    load_image_dataset,
    load_image_stream,
    read_class_names,
)
from peft_vlm.data.class_names import match_labels, read_class_list
from peft_vlm.errors import ClassNameError, DataError, PeftVLMWarning
from peft_vlm.text.prompts import check_class_names
from tests.data.test_loading import write_csv, write_images
from tests.tiny import clip_processor, noise_image


def labelled(labels: list, feature: object) -> HFDataset:
    """Tiny images with labels."""
    columns = {"image": [noise_image(4, 4) for _ in labels], "label": labels}
    return HFDataset.from_dict(columns, features=Features({"image": ImageFeature(), "label": feature}))


def names_of(dataset: ImageClassificationDataset) -> list[str]:
    """Class name of every image."""
    return [dataset.class_names[label] for label in dataset.labels]


def test_a_list_with_the_known_names_reorders_and_never_renames() -> None:
    """Every cat was called a dog."""
    table = labelled([0, 1, 1], ClassLabel(names=["cat", "dog"]))
    for names in (["dog", "cat"], ["Dog", "bird", "cat"], ["cat", "dog"]):
        dataset = load_image_dataset(table, class_names=names)
        assert dataset.class_names == tuple(names)
        assert [name.lower() for name in names_of(dataset)] == ["cat", "dog", "dog"]
        stream = load_image_stream(
            table, class_names=names, num_images=3, shuffle_buffer=0, transform=EvalTransform(clip_processor())
        )
        assert [names[item["labels"]].lower() for item in stream] == ["cat", "dog", "dog"]
    with pytest.raises(DataError, match="1 of 2 labels are not among the 2 class names, the first is 'dog'"):
        load_image_dataset(table, class_names=["cat", "wolf"])


def test_names_are_compared_as_prompts_spell_them(tmp_path: Path) -> None:
    """`golden_retriever` and "Golden Retriever" are one class; by place, the sea lions were retrievers."""
    write_images(tmp_path, "golden_retriever/1.png", "sea_lion/1.png")
    dataset = load_image_dataset(tmp_path, class_names=["Sea lion", "Golden Retriever"])
    assert names_of(dataset) == ["Golden Retriever", "Sea lion"]
    assert match_labels(["crane", "Crane"], ["Crane", "crane"])[0] == {"crane": 1, "Crane": 0}


def test_codes_are_renamed_by_place_and_the_log_says_how(caplog: pytest.LogCaptureFixture) -> None:
    """A mapping that nobody sees may be wrong."""
    table = labelled([0, 1], ClassLabel(names=["n01440764", "n01443537"]))
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        assert names_of(load_image_dataset(table, class_names=["tench", "goldfish"])) == ["tench", "goldfish"]
    assert "'n01440764' is 'tench', 'n01443537' is 'goldfish'" in caplog.text


def test_the_class_list_is_that_of_all_splits(tmp_path: Path) -> None:
    """The test split lacks class `a`: base and new were halves of the other seven."""
    train, test = labelled(list("abc"), Value("string")), labelled(list("cb"), Value("string"))
    for split, table in (("train", train), ("test", test)):
        table.to_parquet(tmp_path / f"{split}.parquet")
    for source in (DatasetDict({"train": train, "test": test}), tmp_path):
        dataset = load_image_dataset(source, split="test")
        assert (dataset.class_names, dataset.labels) == (("a", "b", "c"), [2, 1])
    parts = {
        "train": labelled([0, 1], ClassLabel(names=["cat", "dog"])),
        "test": labelled([0, 1], ClassLabel(names=["dog", "owl"])),
    }
    datasets = {split: load_image_dataset(parts, split=split) for split in parts}
    assert set(datasets["train"].class_names) == set(datasets["test"].class_names) == {"cat", "dog", "owl"}
    assert datasets["train"].class_names == datasets["test"].class_names, "one label would mean two classes"
    assert names_of(datasets["test"]) == ["dog", "owl"]


def test_numbers_are_no_names_in_any_source(tmp_path: Path) -> None:
    """A text encoder was asked for "a photo of a 1.0."."""
    write_images(tmp_path, "a.png", "b.png")
    path = write_csv(tmp_path / "list.csv", ("image", "label"), ("a.png", "1.0"), ("b.png", "0.0"))
    sources = [
        path,
        labelled([0, 1], ClassLabel(names=["0", "1"])),
        labelled(["0", "1"], Value("string")),
        labelled([0.0, 1.0], Value("float64")),
    ]
    for source in sources:
        with pytest.raises(DataError, match="are numbers without names. Pass `class_names`"):
            load_image_dataset(source)
        dataset = load_image_dataset(source, class_names=["cat", "dog"])
        assert names_of(dataset) == (["dog", "cat"] if source is path else ["cat", "dog"])
    digits = load_image_dataset(sources[1], class_names=["1", "0"])
    assert names_of(digits) == ["0", "1"], "digits that are asked for are names"
    with pytest.raises(DataError, match="are numbers without names"):
        load_image_stream(sources[1], num_images=2)
    assert names_of(load_image_dataset(labelled([3, 7], Value("int64")), class_names={3: "x", 7: "y"})) == ["x", "y"]


def test_numbered_names_are_ids_by_their_number() -> None:
    """`datasets` sorts the folders "0", "1", "10", "2" as text, so place 2 is not class 2."""
    table = labelled([0, 1, 2, 3], ClassLabel(names=["0", "1", "10", "2"]))
    names = [f"word {number}" for number in range(11)]
    assert names_of(load_image_dataset(table, class_names=names)) == ["word 0", "word 1", "word 10", "word 2"]


@pytest.mark.parametrize("names", [["n01440764", "n01443537"], ["class_1", "class_2"], ["A1", "A2"]])
def test_codes_as_names_warn(names: list[str], tmp_path: Path) -> None:
    """They mean nothing to a text encoder, and the accuracy is that of chance."""
    write_images(tmp_path, *(f"{name}/1.png" for name in names))
    for source in (tmp_path, labelled([0, 1], ClassLabel(names=names)), labelled(names, Value("string"))):
        with pytest.warns(PeftVLMWarning, match="class names are codes, such as"):
            load_image_dataset(source)
        load_image_dataset(source, class_names={names[0]: "tench", names[1]: "goldfish"})
    with pytest.warns(PeftVLMWarning, match="class names are codes"):
        load_image_stream(labelled([0, 1], ClassLabel(names=names)), num_images=2)


def test_missing_and_several_labels_are_explained() -> None:
    """The first was "numbers without names", the second a TypeError."""
    with pytest.raises(DataError, match="Expected one label per image.*got None in row 1"):
        load_image_dataset(labelled(["cat", None], Value("string")))
    with pytest.raises(DataError, match=r"got \['cat', 'dog'\] in row 0.*one row per label"):
        load_image_dataset(labelled([["cat", "dog"]], [Value("string")]))
    with pytest.raises(DataError, match="got 0.5 in row 0"):
        load_image_dataset(labelled([0.5], Value("float64")), class_names=["cat"])


@pytest.mark.parametrize("character", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x1b", "\0"])
def test_names_with_control_characters_are_refused(character: str) -> None:
    """They shift the lines of a list, or steer a terminal."""
    with pytest.raises(ClassNameError, match="Class 1 .*control character"):
        check_class_names(["cat", f"sea{character}lion"])


def test_only_line_feeds_end_a_name(tmp_path: Path) -> None:
    """`splitlines` also splits at U+2028 and form feeds, and all labels behind it shift."""
    (tmp_path / "names.txt").write_bytes("cat\r\nsea\u2028lion\nox\x0cen\n".encode())
    assert read_class_names(tmp_path / "names.txt") == ["cat", "sea\u2028lion", "ox\x0cen"]
    with pytest.raises(ClassNameError, match="Class 1"):
        load_image_dataset(labelled([0], Value("int64")), class_names=tmp_path / "names.txt")
    (tmp_path / "words.txt").write_text("n01440764 tench\u2028fish\nn01443537 gold\x1dfish\n", encoding="utf-8")
    assert len(read_class_list(tmp_path / "words.txt")) == 2


def test_a_word_is_no_list_of_names() -> None:
    """ "cat" was read as the classes c, a, t."""
    rows = [{"image": np.zeros((2, 2, 3), np.uint8), "label": 0}]
    with pytest.raises(ClassNameError, match="Expected a list of at least one class name, got 'cat'"):
        ImageClassificationDataset(rows, "cat")
