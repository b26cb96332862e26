"""Streams: every image once, divided among processes and workers, resumed without decoding, balanced; class lists."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.utils.data import DataLoader

from peft_vlm.data import open_stream, read_class_list
from peft_vlm.data.streaming import count_labels
from peft_vlm.errors import DataError
from tests.tiny import colour_rows
from tests.tiny_streams import NAMES, stream, table, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in four parquet files."""
    return write_shards(tmp_path_factory.mktemp("shards"))


def labels(items) -> list[int]:
    return [int(item["labels"]) for item in items]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(shards: Path):
    images = stream(shards)
    assert images.class_names == tuple(NAMES)
    epochs = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        items = list(images)
        assert len(items) == len(images) == 24
        assert sorted(item["index"] for item in items) == list(range(24))
        epochs.append(labels(items))
    assert epochs[0] == epochs[2] != epochs[1]
    assert Counter(epochs[0]) == Counter(epochs[1]) == dict.fromkeys(range(6), 4)


def test_processes_and_workers_divide_the_stream(shards: Path):
    """Equally many whole batches each, and together every image once."""
    found, counts = Counter(), []
    for rank in range(2):
        images = stream(shards)
        images.divide(batch_size=3, rank=rank, world_size=2)
        loader = DataLoader(images, batch_size=3, num_workers=2 if rank else 0, collate_fn=images.collate)
        batches = list(loader)
        counts.append([len(batch["labels"]) for batch in batches])
        found.update(int(label) for batch in batches for label in batch["labels"])
    assert counts == [[3] * 4, [3] * 4]
    assert found == dict.fromkeys(range(6), 4)


def test_a_resumed_epoch_goes_on_with_the_same_images_and_decodes_none_of_the_skipped(shards: Path):
    images = stream(shards)
    images.divide(batch_size=4, rank=0, world_size=1)
    straight = list(images)
    images.skip_batches(3)
    resumed = list(images)
    assert all(item["pixel_values"].numel() == 1 for item in resumed[:12])
    for a, b in zip(straight[12:], resumed[12:], strict=True):
        assert (a["labels"], a["index"]) == (b["labels"], b["index"])
        assert torch.equal(a["pixel_values"], b["pixel_values"])


def test_tables_in_memory_and_hugging_face_streams_are_streams_too():
    for source in (table(), table().to_iterable_dataset(num_shards=3)):
        assert Counter(labels(stream(source))) == dict.fromkeys(range(6), 4)


def test_webdataset_shards_with_wordnet_ids(tmp_path: Path):
    rows = colour_rows(2)
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for number, row in enumerate(rows):
            picture = io.BytesIO()
            row["image"].save(picture, "PNG")
            for extension, data in (("png", picture.getvalue()), ("cls.txt", f"n0000000{row['label']}".encode())):
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    names = {f"n0000000{number}": name for number, name in enumerate(NAMES)}
    images = stream(tmp_path, class_names=names, num_images=12, image_column="png", label_column="cls.txt")
    items = list(images)
    assert Counter(labels(items)) == dict.fromkeys(range(6), 2)
    assert items[0]["pixel_values"].shape == (3, 16, 16)


def test_balanced_sampling_shows_no_class_more_often_than_asked():
    rows = [row for row in colour_rows(40) if row["label"] < 1] + [row for row in colour_rows(4) if row["label"] > 0]
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    images = stream(Dataset.from_list(rows, features=features), images_per_class=4, num_images=None)
    assert len(images) == 24
    seen = Counter()
    for epoch in range(10):
        images.set_epoch(epoch)
        seen.update(labels(images))
    assert sum(seen.values()) == 240
    assert seen[0] < 70  # 40 in expectation; 160 of 240 with natural sampling
    assert min(seen.values()) > 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": None}, "does not know its length"),
        ({"num_images": 0}, "at least 1, got 0"),
        ({"class_names": ["red"]}, "5 of 6 labels are not among the 1 class names, the first is 'orange'"),
        ({"label_column": "cls"}, r"the column 'cls', got the columns \['image', 'label'\].*by file endings"),
    ],
)
def test_streams_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        list(stream(table(), **settings))


def named_by_id(per_class: int = 2) -> Dataset:
    """Rows whose labels are WordNet ids."""
    rows = [row | {"label": f"n0000000{row['label']}"} for row in colour_rows(per_class)]
    return Dataset.from_list(rows, features=Features({"image": Image(), "label": Value("string")}))


def test_counting_leaves_out_the_names_without_images():
    """WordNet names 82,115 nouns, ImageNet-21K shows 21,841 of them: the others would only be negatives."""
    names = {f"n0000000{number}": f"thing {number}" for number in (9, *range(5, -1, -1), 8)}
    images = stream(named_by_id(), class_names=names, images_per_class=1, num_images=None)
    assert images.class_names == tuple(f"thing {number}" for number in range(5, -1, -1))
    assert len(images) == 6
    assert {int(item["labels"]) for item in images} <= set(range(6))
    assert len(stream(named_by_id(), class_names=names).class_names) == 8


def test_counting_parquet_reads_labels_alone(tmp_path: Path):
    """The images of ImageNet-21K are 1,000 GB, their labels 20 MB."""
    count = Path("/proc/self/io")
    if not count.is_file():
        pytest.skip("this system does not count what a process reads")
    noise = np.random.default_rng(0)
    rows = [{"image": {"bytes": noise.bytes(200_000), "path": None}, "label": number % 6} for number in range(48)]
    table = Dataset.from_list(rows, features=Features({"image": Image(decode=False), "label": Value("int64")}))
    table.to_parquet(tmp_path / "train.parquet")
    size = (tmp_path / "train.parquet").stat().st_size
    assert size > 9_000_000
    read = []
    for columns in (None, ["label"]):
        labels_of = open_stream(tmp_path, columns=columns)
        before = int(count.read_text().split()[1])
        assert count_labels(labels_of, "label", NAMES, None) == [8] * 6
        read.append(int(count.read_text().split()[1]) - before)
    assert read[1] < size / 10 < size < read[0]


def test_webdataset_labels_that_are_no_integers_say_where_they_belong(tmp_path: Path):
    """`datasets` reads `cls` files as integers."""
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        picture = io.BytesIO()
        colour_rows(1)[0]["image"].save(picture, "PNG")
        for name, data in (("0.png", picture.getvalue()), ("0.cls", b"n00000001")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match="'cls' of webdataset shards hold integers.*'cls.txt'"):
        stream(tmp_path, class_names={"n00000001": "red"}, image_column="png", label_column="cls")


def test_an_empty_stream_is_refused():
    for source in (table().select([]), table().to_iterable_dataset().filter(lambda row: False)):
        with pytest.raises(DataError, match="rows, got"):
            stream(source)


def test_labels_of_no_class_are_refused_when_they_are_counted():
    """-1, no label, is not the last class; an unknown id is named."""
    rows = [row | {"label": -1 if row["label"] == 5 else row["label"]} for row in colour_rows(2)]
    unlabelled = Dataset.from_list(rows, features=Features({"image": Image(), "label": Value("int64")}))
    with pytest.raises(DataError, match="6 classes, got -1 in column 'label'"):
        stream(unlabelled, class_names=NAMES, images_per_class=1)
    with pytest.raises(DataError, match="1 classes, got 'n00000001' in column 'label'.*a mapping"):
        stream(named_by_id(), class_names={"n00000000": "red"}, images_per_class=1)


def test_a_folder_without_shards_and_too_few_images_are_refused(tmp_path: Path, shards: Path):
    with pytest.raises(DataError, match=r"Expected '<split>\*.parquet' or '<split>\*.tar'"):
        open_stream(tmp_path)
    with pytest.raises(DataError, match="a batch for each of 4 processes"):
        stream(shards).divide(batch_size=7, rank=0, world_size=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tench\ngold fish\n", ["tench", "gold fish"]),
        (
            "n01440764\ttench, Tinca tinca\nn02012849\tcrane\nn03126707\tcrane, hoist\n",
            {"n01440764": "tench", "n02012849": "crane (n02012849)", "n03126707": "crane (hoist)"},
        ),
        ("n01440764 tench\nn01443537 gold_fish\n", {"n01440764": "tench", "n01443537": "gold fish"}),
        (
            "  1 This software and database is licensed\n00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that\n"
            "01440764 05 n 02 tench 0 Tinca_tinca 0 001 @ 01440000 n 0000 | freshwater fish\n",
            {"n00001740": "entity", "n01440764": "tench"},
        ),
    ],
)
def test_class_lists_of_text_files_and_wordnet(tmp_path: Path, text: str, expected):
    path = tmp_path / "names.txt"
    path.write_text(text)
    assert read_class_list(path) == expected


def test_an_image_that_cannot_be_read_is_an_error_or_counted(caplog):
    """The next image stands in for it and comes in its own turn too; the order of all others stays."""
    rows = colour_rows(4)
    whole = Dataset.from_list(rows, features=table().features)
    damaged = whole.cast_column("image", Image(decode=False)).to_list()
    damaged[5]["image"]["bytes"] = damaged[5]["image"]["bytes"][:40]
    damaged = Dataset.from_list(damaged, features=table().features)
    images, expected = stream(damaged, shuffle_buffer=0), list(stream(whole, shuffle_buffer=0))
    with pytest.raises(DataError, match="image 5 of the stream"):
        list(images)
    images.unreadable.skip(True)
    items = list(images)
    assert images.unreadable.rows == [5]
    assert "Another image takes the place" in caplog.text
    assert labels(items) == [*labels(expected[:5]), int(expected[6]["labels"]), *labels(expected[6:])]
    images.skip_batches(4)
    assert labels(list(images)[4:]) == labels(items)[4:]


def test_a_stream_of_unreadable_images_ends():
    """Looking for the next readable image forever would look like a slow disk."""
    broken = [{"image": {"bytes": b"none", "path": None}, "label": 0}] * 4
    images = stream(Dataset.from_list(broken, features=table().features))
    images.unreadable.skip(True)
    with pytest.raises(DataError, match="got 100 in a row that are not"):
        list(images)
