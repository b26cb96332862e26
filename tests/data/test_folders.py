"""Folders and lists of images: what is a split, what is a class, and what is left out and counted."""

import json
import logging
import os
from pathlib import Path

import pytest
from datasets.data_files import SPLIT_KEYWORDS

from peft_vlm.data import load_image_dataset, load_unlabelled_images
from peft_vlm.data.folders import SPLIT_WORDS, split_of
from peft_vlm.errors import DataError
from peft_vlm.serving.images import find_images
from tests.data.test_loading import write_csv, write_images
from tests.tiny import noise_image


def test_split_words_are_those_of_datasets_in_any_case() -> None:
    """Five lower-case words made classes of "Training" and "Testing"."""
    assert {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words} == SPLIT_WORDS
    assert [split_of(name) for name in ("Training", "VAL", "test_images", "my-train 2", "evaluation")] == [
        *("train", "validation", "test", "train", "test")
    ]
    assert [split_of(name) for name in ("cat", "protest", "trainer", "testament")] == [None] * 4


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("train_set", "dev"), ("TRAIN", "Eval")])
def test_split_folders_by_other_words_are_no_classes(tmp_path: Path, train: str, test: str) -> None:
    """Classes "Training" and "Testing" would be learned, at a perfect score."""
    write_images(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/b/1.png", f"{test}/a/2.png")
    dataset = load_image_dataset(tmp_path, split="validation" if test == "dev" else "test")
    assert (dataset.class_names, dataset.labels) == (("a", "b"), [0, 1])
    assert len(load_image_dataset(tmp_path)) == 2
    assert load_image_dataset(tmp_path, split=test).labels == [0, 1]
    with pytest.raises(DataError, match="has the splits .*got `split`='nonsense'"):
        load_image_dataset(tmp_path, split="nonsense")


def test_two_folders_of_one_split_need_their_own_name(tmp_path: Path) -> None:
    """Taking either would be a guess."""
    write_images(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "dev/b/1.png")
    assert load_image_dataset(tmp_path, split="dev").labels == [1]
    with pytest.raises(DataError, match=r"splits \['dev', 'train', 'val'\], got `split`='validation'"):
        load_image_dataset(tmp_path, split="validation")


def test_split_words_among_classes_are_an_error(tmp_path: Path) -> None:
    """CIFAR-100 has a class "train"; inside a split folder it is one."""
    write_images(tmp_path, "train/1.png", "cat/1.png")
    with pytest.raises(DataError, match=r"split folders \['train'\] beside \['cat'\].*If all are classes, move them"):
        load_image_dataset(tmp_path)
    write_images(tmp_path / "inside", "train/train/1.png", "train/cat/1.png")
    assert load_image_dataset(tmp_path / "inside").class_names == ("cat", "train")
    write_images(tmp_path / "deep", "pets/train/a/1.png", "pets/test/a/1.png")
    with pytest.raises(DataError, match=r"deep/pets' holds folders only, \['test', 'train'\]. Pass the folder"):
        load_image_dataset(tmp_path / "deep")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("cat/1.png", "cat/2.png"), "has one class, 'cat', so there is nothing to tell apart"),
        (("train/cat/1.png", "test/cat/2.png"), "has one class, 'cat'"),
        (
            ("train/images/cat/1.png", "train/images/dog/1.png"),
            "folder 'images', which is no class. Pass .* or move",
        ),
        (("images/cat/1.png", "images/dog/1.png"), "single folder 'images', which is no class"),
        (("a/x/1.png", "a/y/1.png", "b/1.png"), r"a' holds folders only, \['x', 'y'\]"),
        (("train/1.png", "train/2.png"), "2 images lie directly in .*says nothing of their classes.*metadata.csv"),
        (("train/train/1.png", "train/test/1.png"), r"have names of splits, \['test', 'train'\]"),
    ],
)
def test_folders_that_are_no_classes_are_explained(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    """One class "images" has an accuracy of 100 %."""
    write_images(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        load_image_dataset(tmp_path)


def test_a_part_without_classes_does_not_hide_the_others(tmp_path: Path) -> None:
    """Many sets have test images without labels; the training images are none the worse for it."""
    write_images(tmp_path, "train/a/images/1.png", "train/b/images/1.png", "val/images/1.png", "test/1.png")
    assert load_image_dataset(tmp_path).class_names == ("a", "b")
    with pytest.raises(DataError, match="single folder 'images'"):
        load_image_dataset(tmp_path, split="val")
    with pytest.raises(DataError, match="1 images lie directly in"):
        load_image_dataset(tmp_path, split="test")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_files_give_the_labels(tmp_path: Path, ending: str) -> None:
    """`datasets` reads them; the folder names "train" and "test" were the classes here."""
    write_images(tmp_path, *(f"{split}/{number}.png" for split in ("train", "test") for number in range(3)))
    for split, labels in (("train", ["ox", "bee"]), ("test", ["bee", "ox", "ox"])):
        rows = [{"file_name": f"{number}.png", "label": label} for number, label in enumerate(labels)]
        path = tmp_path / split / f"metadata.{ending}"
        if ending == "csv":
            write_csv(path, ("file_name", "label"), *(tuple(row.values()) for row in rows))
        else:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train, test = load_image_dataset(tmp_path), load_image_dataset(tmp_path, split="test")
    assert (train.class_names, train.labels, test.labels) == (("bee", "ox"), [1, 0], [0, 1, 1])


def test_one_metadata_file_serves_all_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the folder in the path, or by a column; images that it does not name are counted."""
    write_images(tmp_path, "train/1.png", "train/2.png", "test/1.png", "test/2.png")
    rows = (("file_name", "label"), ("train/1.png", "a"), ("train/2.png", "b"), ("test/1.png", "b"))
    write_csv(tmp_path / "metadata.csv", *rows)
    assert load_image_dataset(tmp_path, split="test").labels == [1]
    assert "Left out of" in caplog.text
    assert "1 images that `metadata` does not name" in caplog.text
    write_images(tmp_path / "flat", "1.png", "2.png", "3.png")
    rows = (("file_name", "label", "split"), ("1.png", "a", "train"), ("2.png", "b", "train"), ("3.png", "a", "test"))
    write_csv(tmp_path / "flat/metadata.csv", *rows)
    assert load_image_dataset(tmp_path / "flat", split="test").labels == [0]
    write_csv(tmp_path / "flat/metadata.csv", ("file_name", "label"), ("1.png", "a"), ("9.png", "b"))
    with pytest.raises(DataError, match="1 of 2 image files are missing"):
        load_image_dataset(tmp_path / "flat")


def test_lists_named_after_splits_are_splits(tmp_path: Path) -> None:
    """`train.csv` and `test.csv` beside a folder of images; the classes are those of both."""
    write_images(tmp_path, *(f"images/{number}.png" for number in range(4)))
    write_csv(tmp_path / "train.csv", ("image", "label"), ("images/0.png", "ox"), ("images/1.png", "ant"))
    write_csv(tmp_path / "Test.CSV", ("image", "label"), ("images/2.png", "bee"), ("images/3.png", "ox"))
    train, test = (load_image_dataset(tmp_path, split=split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "bee", "ox")
    assert (train.labels, test.labels) == ([2, 0], [1, 2])
    assert load_image_dataset(tmp_path / "Test.CSV", split="test").labels == [0, 1]
    with pytest.raises(DataError, match=r"splits \['Test'\], got `split`='train'"):
        load_image_dataset(tmp_path / "Test.CSV", split="train")


def test_lists_of_other_makes_are_read_or_explained(tmp_path: Path) -> None:
    """Upper case, tabs, Latin-1, semicolons: each was a misleading message."""
    write_images(tmp_path, "a.png", "b.png")
    (tmp_path / "DATA.TSV").write_text("image\tlabel\na.png\tcat, big\nb.png\tdog\n")
    assert load_image_dataset(tmp_path / "DATA.TSV").class_names == ("cat, big", "dog")
    (tmp_path / "DATA.CSV").write_text("image , label\na.png, cat \nb.png, dog\na.png,cat\n")
    assert load_image_dataset(tmp_path / "DATA.CSV").labels == [0, 1, 0], "blanks around a name make no class"
    (tmp_path / "latin.csv").write_bytes("image,label\na.png,K\u00e4fer\nb.png,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="is no UTF-8 text .*Save it as UTF-8"):
        load_image_dataset(tmp_path / "latin.csv")
    (tmp_path / "excel.csv").write_bytes("image,label\na.png,K\u00e4fer\n".encode("utf-16"))
    with pytest.raises(DataError, match="iconv -f utf-16"):
        load_image_dataset(tmp_path / "excel.csv")
    (tmp_path / "german.csv").write_text("image;label\na.png;cat\n")
    with pytest.raises(DataError, match=r"got \['image;label'\].*separate cells by ','"):
        load_image_dataset(tmp_path / "german.csv")


def test_every_raster_image_is_found_by_name_or_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of .jpg .jfif .avif .ppm one in four was read, and nothing said so."""
    files = [f"{label}/1{end}" for label in "ab" for end in (".jpg", ".jfif", ".avif", ".ppm", ".jp2", ".TIF")]
    write_images(tmp_path, *files)
    noise_image(4, 4).save(tmp_path / "a/no ending", "PNG")
    for name in ("a/notes.txt", "a/more.txt", "b/.hidden.png", "a/drawing.svg", "b/figure.eps"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0")
    write_images(tmp_path, "__MACOSX/a/1.png", ".git/2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b/loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a/pipe.png")
    write_images(tmp_path / "elsewhere", "3.png")
    (tmp_path / "b/link.png").symlink_to(tmp_path / "elsewhere/3.png")
    (tmp_path / "b/linked").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        found = find_images(tmp_path)
        find_images(tmp_path)
    assert len(found) == len(files) + 1 + 3
    (message,) = [record.getMessage() for record in caplog.records]
    for part in ("2 files '.txt'", "1 files '.svg'", "1 files '.eps'", "1 links in a circle", "1 empty folders"):
        assert part in message
    assert "3 hidden files and folders" in message
    assert "1 files '.png'" in message, "a pipe is no file"
    dataset = load_image_dataset(tmp_path, class_names=["a", "b", "elsewhere"])
    assert all(dataset.image(index).size == (4, 4) for index in range(len(dataset)))
    assert len(load_unlabelled_images(tmp_path, ["x", "y"])) == len(found)


def test_archives_are_not_taken_for_folders(tmp_path: Path) -> None:
    """The message says what to do."""
    (tmp_path / "train.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="No images in .*It holds archives: unpack them"):
        load_image_dataset(tmp_path)
    with pytest.raises(DataError, match="no file that can be read.*unpack archives"):
        load_image_dataset(tmp_path / "train.zip")
