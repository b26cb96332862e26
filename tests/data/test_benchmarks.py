"""CoOp's folders: each of the 15 layouts gives the images, labels, names, order and shots that its code takes."""

import shutil
from pathlib import Path

import pytest

from peft_vlm.data import ImageClassificationDataset, load_benchmark
from tests.benchmark_trees import CLASSES, PARTS, SPLIT_FILES, entries, write_trees


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 15 trees, which tests leave as they are."""
    root = tmp_path_factory.mktemp("DATA")
    write_trees(root)
    return root


@pytest.fixture
def own(trees: Path, tmp_path: Path) -> Path:
    """A copy for tests that damage it."""
    return Path(shutil.copytree(trees, tmp_path / "DATA"))


def files(images: ImageClassificationDataset, root: Path) -> list[str]:
    """Image paths below a folder, in order."""
    return [str(Path(images.path_of(index)).relative_to(root)) for index in range(len(images))]


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("name", SPLIT_FILES)
def test_split_files_give_their_images_in_their_order(trees: Path, name: str, part: str) -> None:
    """Sorted by class or by name, a seed would draw other shots than CoOp's."""
    images = load_benchmark(name, trees, split=part)
    assert files(images, trees / SPLIT_FILES[name][1]) == [file for file, _, _ in entries(name, part)]
    assert images.labels == [label for label, _ in PARTS[part]]
    assert images.class_names == tuple(CLASSES[name])
    assert images.image(0).size == (4, 4)


def test_aircraft_reads_the_official_lists(trees: Path) -> None:
    """Names hold slashes and dashes, which no path may be made of; labels are lines of variants.txt."""
    train, val, test = (load_benchmark("fgvc_aircraft", trees, split=part) for part in ("train", "val", "test"))
    folder = trees / "fgvc_aircraft" / "images"
    assert files(train, folder) == ["1025794.jpg", "1340192.jpg", "0056978.jpg", "0450014.jpg", "1042824.jpg"]
    assert (train.labels, val.labels, test.labels) == ([0, 1, 0, 2, 0], [2, 1], [1, 2])
    assert train.class_names == val.class_names == test.class_names == ("707-320", "F/A-18", "DR-400")
    assert files(val, folder) == ["0034309.jpg", "0999999.jpg"]


def test_imagenet_reads_class_folders_named_by_its_list(trees: Path) -> None:
    """The images of `val` are the test; a name that comes twice gets a capital, which CLIP does not read."""
    train, test = (load_benchmark("imagenet", trees, split=part) for part in ("train", "test"))
    assert train.class_names == test.class_names == ("tench", "stingray", "lynx", "sunglasses", "Sunglasses")
    assert train.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert test.labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    images = trees / "imagenet" / "images"
    assert files(train, images)[:4] == [
        *(f"train/n01440764/n01440764_{number}.JPEG" for number in (0, 1, 2)),
        "train/n01498041/n01498041_0.JPEG",
    ]
    assert files(test, images)[-1] == "val/n04356056/n04356056_1.JPEG"


def test_the_variants_are_scored_over_their_own_classes(trees: Path) -> None:
    """V2's folders are numbers of lines; A and R have some of the classes, labelled from 0 in the order of ids."""
    v2, sketch, a, r = (
        load_benchmark(name, trees, split="test")
        for name in ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
    )
    every = ("tench", "stingray", "lynx", "sunglasses", "Sunglasses")
    assert (v2.labels, v2.class_names) == ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], every)
    assert (sketch.labels, sketch.class_names) == ([0, 1, 2, 3, 4], every)
    assert (a.labels, a.class_names) == ([0, 1, 1], ("stingray", "lynx"))
    assert (r.labels, r.class_names) == ([0, 0, 1], ("tench", "sunglasses"))
    folder = trees / "imagenet-adversarial" / "imagenet-a"
    assert files(a, folder) == [
        "n01498041/n01498041_0.JPEG",
        "n02127052/n02127052_0.JPEG",
        "n02127052/n02127052_1.JPEG",
    ]
