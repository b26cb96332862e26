"""CoOp's folders: each of the 15 layouts gives the images, labels, names, order and shots that its code takes."""

import json
import logging
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from peft_vlm.data import (
    BENCHMARKS,
    ImageClassificationDataset,
    load_benchmark,
    load_image_dataset,
)
from peft_vlm.data.benchmarks import template_for
from peft_vlm.errors import DataError
from tests.benchmark_trees import CLASSES, PARTS, SPLIT_FILES, entries, put_image, write_trees


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 15 trees, which tests leave as they are."""
    root = tmp_path_factory.mktemp("DATA")
    write_trees(root)
    return root


@pytest.fixture
def own(trees: Path, tmp_path: Path) -> Path:
    """A copy for tests that damage it; images are hard links, which is fast, so none may be written into."""

    def link_or_copy(source: str, target: str) -> None:
        (os.link if source.lower().endswith((".jpg", ".jpeg")) else shutil.copy)(source, target)

    return Path(shutil.copytree(trees, tmp_path / "DATA", copy_function=link_or_copy))


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
    """The images of `val` are the test; two classes of CoOp's list have one name, which no classifier tells apart."""
    train, test = (load_benchmark("imagenet", trees, split=part) for part in ("train", "test"))
    assert train.class_names == test.class_names == ("tench", "stingray", "lynx", "sunglass", "sunglasses")
    assert train.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert test.labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    images = trees / "imagenet" / "images"
    assert files(train, images)[:4] == [
        *(f"train/n01440764/n01440764_{number}.JPEG" for number in (0, 1, 2)),
        "train/n01498041/n01498041_0.JPEG",
    ]
    assert files(test, images)[-1] == "val/n04356056/n04356056_1.JPEG"


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (
            ["n03773504 missile", "n04008634 missile", "n04355933 sunglasses", "n04356056 sunglasses"],
            ("missile", "projectile", "sunglass", "sunglasses"),
        ),
        (["n04008634 missile", "n04355933 sunglasses"], ("missile", "sunglasses")),
        (
            ["n00000001 tench", "n00000002 Tench", "n00000003 tench"],
            ("tench", "Tench (n00000002)", "tench (n00000003)"),
        ),
    ],
)
def test_no_two_classes_have_one_name(tmp_path: Path, lines: list[str], names: tuple[str, ...]) -> None:
    """CLIP's list has two names twice, and with it ImageNet could not be used at all; an edited list may have more."""
    for line in lines:
        put_image(tmp_path / "imagenet-sketch" / "images" / line.split(" ")[0] / "sketch_0.JPEG")
    (tmp_path / "imagenet-sketch" / "classnames.txt").write_text("\n".join(lines))
    assert load_benchmark("imagenet_sketch", tmp_path, split="test").class_names == names


def test_the_variants_are_scored_over_their_own_classes(trees: Path) -> None:
    """V2's folders are numbers of lines; A and R have some of the classes, labelled from 0 in the order of ids."""
    v2, sketch, a, r = (
        load_benchmark(name, trees, split="test")
        for name in ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
    )
    every = ("tench", "stingray", "lynx", "sunglass", "sunglasses")
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


#: Positions in the training and the validation part by shots and seed: `random.sample` of CoOp's code on the positions
#: [0, 2, 6], [1, 4, 5, 8], [3, 7] of the classes in order of appearance, then on [0, 3], [1, 4], [2].
DRAWS = {
    (1, 1): ([0, 1, 7], [0, 4, 2]),
    (2, 1): ([0, 6, 5, 1, 7, 3], [3, 0, 1, 4, 2]),
    (2, 2): ([0, 6, 1, 4, 3, 7], [3, 0, 1, 4, 2]),
    (3, 3): ([0, 6, 2, 8, 5, 1, 3, 7], [0, 3, 1, 4, 2]),
    (16, 1): ([0, 2, 6, 1, 4, 5, 8, 3, 7], [0, 3, 1, 4, 2]),
}


@pytest.mark.parametrize(("shots", "seed"), DRAWS)
def test_shots_are_those_of_coops_code(trees: Path, shots: int, seed: int) -> None:
    """Training images first, then `min(shots, 4)` validation images from the same generator; over all classes."""
    parts = {"train": DRAWS[shots, seed][0], "val": DRAWS[shots, seed][1]}
    for part, positions in parts.items():
        images = load_benchmark("dtd", trees, split=part, shots=shots, seed=seed)
        drawn = [entries("dtd", part)[position][0] for position in positions]
        assert files(images, trees / "dtd" / "images") == drawn
    assert len(load_benchmark("dtd", trees, split="test", shots=shots, seed=seed)) == 3, "a test is never cut"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_validation_shots_are_at_most_four(tmp_path: Path, seed: int) -> None:
    """The draw of the official code, line by line, on a larger split file: 16 shots, and 4 for validation."""
    parts = {part: [(f"{part}{i}.jpg", i * i % 3, "abc"[i * i % 3]) for i in range(60)] for part in ("train", "val")}
    (tmp_path / "eurosat" / "2750").mkdir(parents=True)
    for file, _, _ in parts["train"] + parts["val"]:
        (tmp_path / "eurosat" / "2750" / file).touch()
    split_file = tmp_path / "eurosat" / "split_zhou_EuroSAT.json"
    parts = {part: [row for row in rows if row[1] < 2] for part, rows in parts.items()}
    split_file.write_text(json.dumps({**parts, "test": []}))
    random.seed(seed)
    expected = {}
    for part, shots in (("train", 16), ("val", 4)):
        classes: dict[int, list[str]] = {}
        for file, label, _ in parts[part]:
            classes.setdefault(label, []).append(file)
        expected[part] = [file for members in classes.values() for file in random.sample(members, shots)]
    for part, drawn in expected.items():
        images = load_benchmark("eurosat", tmp_path, split=part, shots=16, seed=seed)
        assert files(images, tmp_path / "eurosat" / "2750") == drawn


def test_a_cached_draw_is_never_opened(own: Path) -> None:
    """A pickle runs what its author wrote into it; CoOp's code opens both of these."""
    for name in ("dtd/split_fewshot/shot_2-seed_1.pkl", "imagenet/preprocessed.pkl"):
        (own / name).parent.mkdir(exist_ok=True)
        os.mkfifo(own / name)  # opening it waits for ever
    assert len(load_benchmark("dtd", own, shots=2, seed=1)) == 6
    assert len(load_benchmark("imagenet", own, shots=2, seed=1)) == 10


@pytest.mark.parametrize("name", ["ucf101", "fgvc_aircraft", "imagenet"])
def test_halves_are_parted_after_the_draw(trees: Path, name: str) -> None:
    """Base is the first half of the labels, rounded up; drawn inside a half, a seed would give other images."""
    every = load_benchmark(name, trees, shots=2, seed=2)
    num_base = (len(every.class_names) + 1) // 2
    base, new = (load_benchmark(name, trees, shots=2, seed=2, classes=half) for half in ("base", "new"))
    assert base.class_names == every.class_names[:num_base]
    assert new.class_names == every.class_names[num_base:]
    rows = list(zip(files(every, trees), every.labels, strict=True))
    assert list(zip(files(base, trees), base.labels, strict=True)) == [row for row in rows if row[1] < num_base]
    relabelled = [(file, label - num_base) for file, label in rows if label >= num_base]
    assert list(zip(files(new, trees), new.labels, strict=True)) == relabelled


def test_templates_are_those_of_coops_code() -> None:
    """One word more or less moves zero-shot accuracy by points; `CUSTOM_TEMPLATES` of its zero-shot trainer."""
    photo = "a photo of a {}."
    assert {name: benchmark.template for name, benchmark in BENCHMARKS.items()} == {
        "imagenet": photo,
        "caltech101": photo,
        "oxford_pets": "a photo of a {}, a type of pet.",
        "stanford_cars": photo,
        "oxford_flowers": "a photo of a {}, a type of flower.",
        "food101": "a photo of {}, a type of food.",
        "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
        "sun397": photo,
        "dtd": "{} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "ucf101": "a photo of a person doing {}.",
        "imagenetv2": photo,
        "imagenet_sketch": photo,
        "imagenet_a": photo,
        "imagenet_r": photo,
    }
    assert template_for("dtd", "data") == "{} texture."
    assert template_for("dtd", None) == photo, "without `data_root` it is a folder of that name"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_missing_part_is_named_with_what_to_put_there(own: Path, name: str) -> None:
    """One message, also where several parts are missing."""
    benchmark = BENCHMARKS[name]
    root = own / benchmark.folder
    for part, what in benchmark.parts.items():
        split = "train" if part == "images/train" else "test"
        (root / part).rename(own / "elsewhere")
        with pytest.raises(DataError) as caught:
            load_benchmark(name, own, split=split)
        (own / "elsewhere").rename(root / part)
        assert f"The benchmark {name!r} lacks {part!r} ({what}) in {str(root)!r}" in str(caught.value)
        assert "\n" not in str(caught.value)
    shutil.rmtree(root)
    with pytest.raises(DataError) as caught:
        load_benchmark(name, own, split="test")
    assert all(part in str(caught.value) for part in benchmark.parts if part != "images/train")
    assert f"pass as `data_root` the folder that holds {benchmark.folder!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "spelling"), [("dtd", "DTD"), ("caltech101", "Caltech_101"), ("food101", "food101")])
def test_a_folder_in_another_spelling_is_pointed_at(own: Path, name: str, spelling: str) -> None:
    """Folders unpack under the names of their authors, and some systems tell no capitals apart."""
    folder = BENCHMARKS[name].folder
    (own / folder).rename(own / spelling)
    with pytest.raises(DataError, match=f"'{name}' in '.*{folder}', got '{spelling}' beside it. Rename it."):
        load_benchmark(name, own)


@pytest.mark.parametrize("name", [*SPLIT_FILES, "fgvc_aircraft"])
def test_images_that_a_list_names_and_that_are_missing_are_counted(own: Path, name: str) -> None:
    """A tree that was unpacked by half, or another version of it."""
    images = load_benchmark(name, own, split="test")
    Path(images.path_of(1)).unlink()
    with pytest.raises(DataError, match=rf"{name}.*1 of {len(images)} image files are missing, the first is '.*jpg'"):
        load_benchmark(name, own, split="test")
    load_benchmark(name, own, split="val")


@pytest.mark.parametrize("name", ["imagenet", "imagenetv2", "imagenet_sketch"])
def test_a_missing_class_folder_shifts_no_label(own: Path, name: str) -> None:
    """CoOp's code numbers the folders that it finds, so that all later classes would get another name."""
    folder = own / BENCHMARKS[name].folder / BENCHMARKS[name].images / ("val" if name == "imagenet" else "")
    gone = sorted(path for path in folder.iterdir() if path.is_dir())[1]
    shutil.rmtree(gone)
    with pytest.raises(DataError, match=rf"{name}.*each of the 5 lines of 'classnames.txt', got 4: \['{gone.name}'\]"):
        load_benchmark(name, own, split="test")
    if name == "imagenet":
        assert len(load_benchmark(name, own).class_names) == 5


@pytest.mark.parametrize("name", ["imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"])
def test_class_folders_that_are_none_are_refused(own: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown folder, or one without images, is another data set or a broken archive; other files are counted."""
    folder = own / BENCHMARKS[name].folder / BENCHMARKS[name].images / ("val" if name == "imagenet" else "")
    first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    (first / "Thumbs.db").write_bytes(b"no image")
    (first / ".hidden.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no class")
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        images = load_benchmark(name, own, split="test")
    assert not any("Thumbs" in file or "hidden" in file for file in files(images, own))
    assert "1 entries of class folders that are no images" in caplog.text
    put_image(folder / "n99999999" / "x.jpg")
    with pytest.raises(DataError, match=rf"{name}.*\['n99999999'\] of 1 are no class"):
        load_benchmark(name, own, split="test")
    shutil.rmtree(folder / "n99999999")
    for file in first.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=rf"{name}.*{first.name}' holds no image"):
        load_benchmark(name, own, split="test")


def test_imagenet_is_tested_without_its_training_images(own: Path) -> None:
    """Zero-shot accuracy and a published adapter need 6 GB of it, not 144."""
    shutil.rmtree(own / "imagenet" / "images" / "train")
    assert len(load_benchmark("imagenet", own, split="test")) == 10


def test_validation_images_without_class_folders_are_refused(own: Path) -> None:
    """ImageNet's archive has them in one folder, without their classes."""
    folder = own / "imagenet" / "images" / "val"
    shutil.rmtree(folder)
    put_image(folder / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match=r"Expected class folders in .*got \['ILSVRC.*Sort images that lie there into"):
        load_benchmark("imagenet", own, split="test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "1025794 Boeing",
            "of the 3 classes of 'variants.txt' in line 6 of 'images_variant_train.txt', got '1025",
        ),
        ("1025794", "in line 6"),
        ("../../secret 707-320", "stay below '.*fgvc_aircraft/images', got '../../secret.jpg'"),
        ("/etc/secret 707-320", "stay below '.*fgvc_aircraft/images', got '/etc/secret.jpg'"),
    ],
)
def test_wrong_lines_of_aircraft_are_named(own: Path, line: str, message: str) -> None:
    """Another edition of the lists, or a stranger's."""
    with (own / "fgvc_aircraft" / "images_variant_train.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=message):
        load_benchmark("fgvc_aircraft", own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tench\nstingray\n", "lines 'n01440764 tench' in 'classnames.txt'"),
        ("n01440764 tench\n", "for each of the 1 lines of 'classnames.txt', got 5"),
        ("", "lines 'n01440764 tench' in 'classnames.txt'"),
    ],
)
def test_another_list_of_class_names_is_refused(own: Path, content: str, message: str) -> None:
    """The file of another project has names without ids."""
    (own / "imagenet" / "classnames.txt").write_text(content)
    with pytest.raises(DataError, match=f"imagenet.*{message}"):
        load_benchmark("imagenet", own)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../secret.jpg",
        "a/../../../secret.jpg",
        "C:\\secret.jpg",
        "..\\secret.jpg",
        "C:x.jpg",
        "",
        ".",
    ],
)
def test_paths_of_a_split_file_stay_below_their_folder(own: Path, path: str) -> None:
    """The file comes from a link on the internet; training on any file of the computer would publish it."""
    put_image(own / "secret.jpg")
    (own / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps({"train": [[path, 0, "banded"]]}))
    with pytest.raises(DataError, match="The benchmark 'dtd' in .*stay below"):
        load_benchmark("dtd", own)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '{"train": {"a": 1}}',
        '{"train": [["a.jpg", 0]]}',
        '{"train": [["a.jpg", "0", "banded"]]}',
        '{"train": [["a.jpg", 0.5, "banded"]]}',
        '{"train": [["a.jpg", true, "banded"]]}',
        '{"train": [[7, 0, "banded"]]}',
        '{"train": [["a.jpg", 0, null]]}',
        '{"train": ["abc"]}',
        '{"train": [["a.jpg", -1, "banded"]]}',
        '{"train": []}',
        '{"test": [["a.jpg", 0, "banded"]]}',
        "[" * 100_000,
        "no json",
    ],
)
def test_split_files_of_other_kinds_are_refused(own: Path, content: str) -> None:
    """Half a download, or the split file of another project."""
    put_image(own / "dtd" / "images" / "a.jpg")
    (own / "dtd" / "split_zhou_DescribableTextures.json").write_text(content)
    with pytest.raises(DataError, match="The benchmark 'dtd' in "):
        load_benchmark("dtd", own)


def test_separators_of_windows_and_links_to_the_data_are_read(own: Path, tmp_path: Path) -> None:
    """A split file may have been written there; CoOp's page advises links to data that lie elsewhere."""
    before = load_benchmark("sun397", own)
    path = own / "sun397" / "split_zhou_SUN397.json"
    path.write_text(path.read_text().replace("/", "\\\\"))
    assert files(load_benchmark("sun397", own), own) == files(before, own)
    other = tmp_path / "other"
    other.mkdir()
    (other / "sun397").symlink_to(own / "sun397", target_is_directory=True)
    assert load_benchmark("sun397", other).labels == before.labels


def test_a_file_that_is_no_image_is_named_when_it_is_read(own: Path) -> None:
    """Its name alone says that it is one."""
    images = load_benchmark("dtd", own, split="test")
    Path(images.path_of(0)).unlink()
    Path(images.path_of(0)).write_text("<html>quota exceeded</html>")
    with pytest.raises(DataError, match="blotchy_0003"):
        load_benchmark("dtd", own, split="test").image(0)


def test_other_numbers_of_classes_than_the_papers_are_said(trees: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A number over 3 textures is not the paper's over 47."""
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        load_benchmark("dtd", trees)
    assert "DescribableTextures has 3 classes here, 47 in the papers." in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Caltech101"}, "got 'Caltech101'. Did you mean 'caltech101'?"),
        ({"name": "oxford-pets"}, "Did you mean 'oxford_pets'?"),
        ({"split": "validation"}, "Expected `split` to be one of"),
        ({"classes": "novel"}, "Expected `classes` to be one of"),
        ({"shots": 0}, "Expected `shots` of at least 1, or None"),
        ({"shots": -1}, "Expected `shots` of at least 1, or None"),
        ({"shots": True}, "Expected `shots` of at least 1, or None"),
        ({"name": "imagenet", "split": "val"}, "It has the parts ['train', 'test'], got `split`='val'. No checkpoint"),
        ({"name": "imagenet_r", "split": "train"}, "It has the parts ['test'], got `split`='train'."),
    ],
)
def test_impossible_wishes_are_refused(trees: Path, options: dict[str, object], message: str) -> None:
    """0 shots would be all images in one program and none in another."""
    with pytest.raises(ValueError, match=re.escape(message)):
        load_benchmark(**{"name": "dtd", "data_root": trees, **options})


def test_a_benchmark_is_a_source_like_any_other(trees: Path) -> None:
    """`load_image_dataset` is what commands call; its words for splits are those of `datasets`."""
    assert load_image_dataset("dtd", data_root=trees).labels == load_benchmark("dtd", trees).labels
    val = load_image_dataset("dtd", data_root=trees, split="validation", seed=5)
    assert (val.labels, val.seed) == (load_benchmark("dtd", trees, split="val").labels, 5)
    with pytest.raises(DataError, match="a benchmark has its own"):
        load_image_dataset("dtd", data_root=trees, class_names=["a", "b", "c"])
