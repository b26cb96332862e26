"""Folders of strangers: links in circles, pipes, sockets, devices, names of any kind, lists that lead elsewhere."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from peft_vlm.cli import main
from peft_vlm.cli.predict import image_files
from peft_vlm.data.class_names import read_class_list, read_class_names
from peft_vlm.data.images import read_image
from peft_vlm.data.loading import load_image_dataset, load_unlabelled_images
from peft_vlm.data.splits import read_zhou_split
from peft_vlm.data.streaming import load_image_stream
from peft_vlm.errors import ClassNameError, DataError
from tests import forked
from tests.hostile.attack import Attack, little_memory, no_connections, outcomes, table
from tests.tiny import noise_image

ROWS = "image,label\n"


def classes(folder: Path) -> None:
    """Two classes with an image each."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        noise_image(10, 10).save(folder / name / "a.png")


def beside(*makers: Callable[[Path], object]) -> Callable[[Path], None]:
    """Sound classes, and more."""
    return lambda folder: (classes(folder), [make(folder) for make in makers]) and None


def text(name: str, content: str) -> Callable[[Path], object]:
    """A text file."""
    return lambda folder: (folder / name).write_text(content)


def link(name: str, target: str) -> Callable[[Path], object]:
    """A link."""
    return lambda folder: (folder / name).symlink_to(target)


def pipe(name: str) -> Callable[[Path], object]:
    """A named pipe, which blocks whoever opens it."""
    return lambda folder: os.mkfifo(folder / name)


def image(*names: bytes | str) -> Callable[[Path], object]:
    """An image in new folders."""

    def make(folder: Path) -> None:
        path = os.path.join(os.fsencode(folder), *map(os.fsencode, names))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            noise_image(10, 10).save(file, "PNG")

    return make


def bound(name: str) -> Callable[[Path], None]:
    """A socket."""

    def make(folder: Path) -> None:
        before = os.getcwd()
        os.chdir(folder)  # the path of a socket has 107 bytes
        with socket.socket(socket.AF_UNIX) as place:
            place.bind(name)
        os.chdir(before)

    return make


def deep(folder: Path) -> None:
    """Folders in folders, beyond the longest path that there is."""
    before = os.getcwd()
    os.chdir(folder / "cat")
    for _ in range(1200):
        os.mkdir("folder")
        os.chdir("folder")
    os.chdir(before)


def links_of_links(folder: Path) -> None:
    """Two links to a folder of two links to a folder ...: 2**30 ways."""
    before = folder / "cat"
    for number in range(30):
        place = folder.parent / f"links{number}"
        place.mkdir()
        for name in "ab":
            (place / name).symlink_to(before)
        before = place
    (folder / "dog" / "links").symlink_to(before)


#: Folders that hold images in spite of what else they hold, and how many.
BEARABLE: dict[str, tuple[Callable[[Path], object], int]] = {
    "circles": (beside(link("cat/up", ".."), link("cat/top", "../../data"), link("dog/here", ".")), 2),
    "links-of-links": (beside(links_of_links), 17),
    "deep": (beside(deep), 2),
    "broken-links": (beside(link("cat/b.png", "nowhere"), link("cat/c.png", "c.png"), link("cat/d", "d")), 2),
    "pipes": (beside(pipe("cat/b.png"), pipe("cat/b"), pipe("c.png")), 2),
    "a-socket": (beside(bound("s.png")), 2),
    "devices": (beside(link("cat/b.png", "/dev/zero"), link("cat/b", "/dev/urandom")), 2),
    "folders-called-as-images": (beside(image("cat", "x.png", "a.png"), lambda f: (f / "dog" / "y.png").mkdir()), 3),
    "names-of-any-bytes": (beside(*(image("cat", name) for name in (b"\xff.png", "a\nb.png", "\x1b[2J.png"))), 5),
    "names-as-patterns": (beside(image("cat", "[a].png"), image("cat", "*?.png"), image("cat", "**", "a.png")), 5),
    "lists-that-are-pipes": (beside(pipe("train.csv"), pipe("metadata.csv"), pipe("metadata.jsonl")), 2),
    "tables-that-are-pipes": (beside(pipe("train.parquet"), pipe("dataset_info.json"), pipe("state.json")), 2),
    "tables-that-are-folders": (beside(lambda f: (f / "train.parquet").mkdir()), 2),
}  # fmt: skip


def count(folder: str, expected: int) -> None:
    """Find the images in every way."""
    os.chdir(folder)
    with little_memory(), no_connections():
        assert len(load_image_dataset(folder)) == expected
        assert len(load_unlabelled_images(folder, ["a", "b"])) == expected
        for pattern in (folder, f"{folder}/**", f"{folder}/**/*.png", "**/*.png", "./**/**/*"):
            assert len(image_files([pattern])) == expected, pattern
        assert len(image_files([f"{folder}/*/**/*.p*g"])) >= expected  # `*` follows a link once


@pytest.mark.parametrize("name", BEARABLE)
@pytest.mark.timeout(60)
def test_images_are_found_beside_anything(name: str, tmp_path: Path) -> None:
    """A pipe waited for ever; links in circles behind `**` took hours."""
    make, expected = BEARABLE[name]
    make(tmp_path / "data")
    try:
        forked.run(tmp_path / "log", count, str(tmp_path / "data"), expected)
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "data")], check=True)  # too deep for what pytest removes it by


def rows(content: str) -> Callable[[Path], object]:
    """A folder with a list."""
    return lambda folder: (folder.mkdir(), text("train.csv", content)(folder))


def saved(name: str) -> Callable[[Path], None]:
    """A folder of `save_to_disk` whose data lie elsewhere."""

    def make(folder: Path) -> None:
        Dataset.from_dict({"image": ["a"], "label": [0]}).save_to_disk(str(folder.parent / "other"))
        Dataset.from_dict({"image": ["a"], "label": [0]}).save_to_disk(str(folder))
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))

    return make


ARROW = "data-00000-of-00001.arrow"
ATTACKS = table(
    Attack("an-address", rows(ROWS + "https://127.0.0.1/x.png,cat\nx,dog\n"), "files are missing", DataError),
    Attack("an-address-of-an-archive", rows(ROWS + "zip://x::https://127.0.0.1/x.zip,cat\n"), "missing", DataError),
    Attack("an-archive-by-address", rows(ROWS + "https://127.0.0.1/::train.csv,a\n"), "got the address", DataError),
    Attack("a-long-path", rows(ROWS + "a" * 5000 + ",cat\n"), "files are missing", DataError),
    Attack("a-zero-in-a-path", rows(ROWS + "a\0b,cat\n"), "files are missing", DataError),
    Attack("a-device", rows(ROWS + "/dev/zero,cat\n"), "files are missing", DataError),
    Attack("a-long-cell", rows(ROWS + '"' + "a" * 200_000 + '",cat\n'), "cannot be read as a table", DataError),
    Attack("no-text", lambda f: (f.mkdir(), (f / "train.csv").write_bytes(b"\xff\xfe\0")), "no UTF-8 text", DataError),
    Attack("a-sparse-list", lambda f: rows("")(f) and os.truncate(f / "train.csv", 2**36), "at most", DataError),
    Attack("brackets", beside(text("metadata.jsonl", "[" * 10**5)), "no JSON object", DataError),
    Attack("a-long-number", beside(text("metadata.jsonl", f'{{"label": {"9" * 5000}}}')), "no JSON object", DataError),
    Attack("a-line-in-a-class", beside(image("a\nb", "a.png")), "control character", ClassNameError),
    Attack("any-bytes-in-a-class", beside(image(b"\xff", "a.png")), "control character", ClassNameError),
    Attack("no-parquet", beside(text("train.parquet", "PAR1")), "cannot be read as a dataset", DataError),
    Attack("no-arrow", beside(text("dataset_info.json", "{")), "cannot be read as a dataset", DataError),
    Attack("no-parts", beside(text("dataset_dict.json", '{"splits": ["a"]}')), "cannot be read", DataError),
    Attack("arrow-elsewhere", saved(f"../other/{ARROW}"), "no file '../other", DataError),
    Attack("arrow-anywhere", saved("/etc/hostname"), "no file '/etc/hostname'", DataError),
    Attack("state-of-lists", lambda f: (saved(ARROW)(f), text("state.json", "[]")(f)), "cannot be read", DataError),
    Attack("nothing", lambda f: f.mkdir(), "No images in", DataError),
    Attack("a-pipe", lambda f: os.mkfifo(f), "no file that can be read", DataError),
)  # fmt: skip


def load(folder: Path) -> None:
    """What `train` and `evaluate` do with a folder."""
    for cell in load_image_dataset(folder / "data").some_images(9):
        read_image(cell)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of each attack."""
    folders = {name: tmp_path_factory.mktemp("folder") for name in ATTACKS}
    for name, folder in folders.items():
        ATTACKS[name].make(folder / "data")
    return outcomes(__name__, "load", folders, tmp_path_factory.mktemp("log") / "log")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_folder_is_refused(results: dict[str, str], name: str) -> None:
    """In one line, within seconds, and without a request."""
    assert not results[name]


@pytest.mark.parametrize(
    "read",
    [
        read_class_names,
        read_class_list,
        lambda path: read_zhou_split(path, root=path.parent),
        lambda path: load_image_dataset(path),
        lambda path: load_image_stream(path),
        lambda path: load_image_dataset(path.parent / "x.csv", class_names=path),
    ],
    ids=["names", "list", "split", "dataset", "stream", "names-of-a-dataset"],
)
@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv", ".parquet"])
@pytest.mark.timeout(20)
def test_what_should_be_a_file_may_be_a_pipe(tmp_path: Path, read: Callable[[Path], object], suffix: str) -> None:
    """Opening it waits for ever."""
    os.mkfifo(tmp_path / f"names{suffix}")
    with pytest.raises(DataError):
        read(tmp_path / f"names{suffix}")


@pytest.mark.parametrize(
    "address",
    [
        *("https://127.0.0.1/x.png", "file:///etc/hostname", "s3://bucket/x.png", "zip://x.png::https://127.0.0.1/x"),
        *("https://127.0.0.1/::x.zip", "simplecache::https://127.0.0.1/x.png", "hf://datasets/a/b/x.png"),
    ],
)
def test_an_image_is_never_an_address(address: str) -> None:
    """A table of anybody's would have the reader call a server, image by image."""
    cells = [address] if "hf://" in address else [address, {"bytes": None, "path": address}]
    with no_connections():
        for cell in cells:
            with pytest.raises(DataError):
                read_image(cell)
        for chained in (f"{address}::hf://datasets/a/b.zip", f"hf://datasets/a/b.png::{address}"):
            with pytest.raises(DataError):
                read_image({"bytes": None, "path": chained})


def test_an_image_in_an_archive_is_as_large_as_one_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive of 10 MB unpacks to 10 GB."""
    import zipfile

    from peft_vlm.data import images

    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 1001)
    with pytest.raises(DataError, match="at most 1,000 bytes"):
        read_image(f"zip://a.png::{tmp_path / 'x.zip'}")


@pytest.mark.parametrize("words", [["predict", "{}", "{}"], ["info", "{}"], ["evaluate", "{}"], ["export", "{}", "o"]])
@pytest.mark.parametrize("name", ["a" * 300, "x\0y", "a/" * 3000, "{pipe}.yaml", "{pipe}"])
@pytest.mark.timeout(20)
def test_arguments_that_are_no_paths_are_one_line(tmp_path: Path, capsys, words: list[str], name: str) -> None:
    """The system's own errors came with a traceback."""
    os.mkfifo(tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "pipe")
    place = name.replace("{pipe}", str(tmp_path / "pipe"))
    try:
        assert main([word.replace("{}", place) for word in words]) == 2
    except SystemExit as stop:  # of argparse, which has usage in front
        assert stop.code == 2  # noqa: PT017
        return
    assert capsys.readouterr().err.count("\n") == 1


def test_links_are_followed(tmp_path: Path) -> None:
    """Folders of links to the images elsewhere are usual."""
    classes(tmp_path / "there")
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"class{number}").symlink_to(tmp_path / "there" / "cat")
    dataset = load_image_dataset(tmp_path / "data", class_names=["a", "b", "c"])
    assert len(dataset) == 3
    assert np.asarray(read_image(tmp_path / "data" / "class0" / "a.png")).shape == (10, 10, 3)
