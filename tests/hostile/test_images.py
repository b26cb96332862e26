"""Images of strangers: no other programs, no gigabytes, no waiting; and crops that come first, bit by bit."""

import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vlm.data.images import read_image
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import DataError, ImageError
from peft_vlm.serving.images import MAX_ASPECT, Preprocessing
from tests import forked
from tests.hostile.attack import Attack, little_memory, outcomes, table
from tests.tiny import clip_processor, noise_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
BINARY_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 99) + b"\0" * 18 + EPS
TIFF = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHIII", 256, 4, 1, 60000, 257, 4, 1, 60000, 0)
NAME = "x.png"


def png(cols: int, rows: int, *, kind: int = 0, data: bytes = b"") -> bytes:
    """A PNG whose header says a size, with little in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", cols, rows, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", data or zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def flat(cols: int, rows: int) -> bytes:
    """A whole PNG of one grey, small as a file."""
    return png(cols, rows, data=zlib.compress(b"\0" * (cols + 1) * rows, 9))


def content(data: bytes):
    """Writes the image."""
    return lambda folder: (folder / NAME).write_bytes(data) and None


ATTACKS = table(
    Attack("postscript", content(EPS), "no image of a kind that is read"),
    Attack("postscript-in-dos-clothes", content(BINARY_EPS), "cannot"),
    Attack("pdf", content(b"%PDF-1.4\n"), "no image of a kind that is read"),
    Attack("many-pixels", content(png(13_000, 13_000)), "at most 89,478,485 pixels"),
    Attack("more-pixels", content(png(60_000, 60_000)), "at most 89,478,485 pixels"),
    Attack("most-pixels", content(png(2**31 - 1, 2**31 - 1)), "pixels"),
    Attack("a-line", content(flat(8000, 1)), "at most 200 times as long as wide, got 8000 x 1"),
    Attack("a-column", content(flat(1, 8000)), "at most 200 times as long as wide, got 1 x 8000"),
    Attack("nothing", content(b""), "cannot"),
    Attack("a-header-alone", content(png(100, 100)[:40]), "cannot"),
    Attack("zlib-bomb-in-a-text", content(png(9, 9)[:33] + b"\0\0\0\x04zTXt" + b"abcd" * 9), "cannot"),
    Attack("tiff-of-many-pixels", content(TIFF), "cannot"),
    Attack("a-folder", lambda folder: (folder / NAME).mkdir(), "no file"),
    Attack("a-pipe", lambda folder: os.mkfifo(folder / NAME), "no file"),
    Attack("a-device", lambda folder: (folder / NAME).symlink_to("/dev/zero"), "no file"),
    Attack("a-link-to-itself", lambda folder: (folder / NAME).symlink_to(NAME), "cannot"),
    Attack("a-sparse-file", lambda folder: truncated(folder / NAME, 2**33), "at most 536,870,912 bytes"),
)  # fmt: skip


def truncated(path: Path, size: int) -> None:
    """A file that says it is large."""
    path.touch()
    os.truncate(path, size)


def read_for_training(folder: Path) -> None:
    """What every dataset does."""
    read_image(folder / NAME)


def preprocessing(side: int = 32, *, resize: tuple[int, ...] = (32,), resample: int = 3) -> Preprocessing:
    """That of an exported classifier."""
    return Preprocessing((side, side), resize, resample, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def read_for_serving(folder: Path) -> None:
    """What a server does."""
    preprocessing()(folder / NAME)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder per attack."""
    made = {name: tmp_path_factory.mktemp("image") for name in ATTACKS}
    for name, folder in made.items():
        ATTACKS[name].make(folder)
    return made


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """What came of each attack, by the function that reads."""
    log = tmp_path_factory.mktemp("log") / "log"
    uses = {"read_for_training": DataError, "read_for_serving": ImageError}
    return {use: outcomes(__name__, use, folders, log, error=error) for use, error in uses.items()}


@pytest.mark.parametrize("use", ["read_for_training", "read_for_serving"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_image_is_refused(results, use, name):
    """By datasets and by servers alike."""
    assert not results[use][name]


def test_no_program_is_started(tmp_path):
    """Pillow runs `gs`, whatever that is on the way."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / NAME).write_bytes(EPS)
    program = f"""
from peft_vlm.serving.images import open_raster
from peft_vlm.data.images import read_image
for call in (lambda: open_raster({str(tmp_path / NAME)!r}).load(), lambda: read_image({str(tmp_path / NAME)!r})):
    try:
        call()
    except Exception as error:
        print(type(error).__name__)
"""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 2
    assert not started.exists()


SIZES = [(50, 20), (20, 50), (7, 5), (300, 9), (9, 300), (32, 32), (33, 32), (200, 1), (91, 300), (300, 91), (40, 500)]


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize(
    "size", [(50, 20), (20, 50), (7, 5), (300, 9), (9, 300), (32, 32), (33, 32), (200, 1), (91, 300)]
)
@pytest.mark.parametrize("resize", [(32,), (40,), (40, 48)])
def test_a_crop_that_comes_first_changes_no_pixel(resample, size, resize):
    """The classifier was trained on the pixels of resize, then crop; bit by bit."""
    image, prepare = noise_image(*size), preprocessing(32, resize=resize, resample=resample)
    rows, cols = prepare._resized(image.height, image.width)
    whole = image.resize((cols, rows), Image.Resampling(resample))
    top, left = (rows - 32) // 2, (cols - 32) // 2
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32)), dtype=np.float32) * np.float32(1)
    actual = np.rint((prepare(image) * 0.5 + 0.5) * 255).transpose(1, 2, 0)
    assert np.array_equal(actual, expected)


def prepare_longest(sizes: list[tuple[int, int]]) -> None:
    """Prepare images of the longest shape that is accepted, for a large model."""
    for size in sizes:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with little_memory(300):
            preprocessing(448, resize=(448,))(Image.new("RGB", size))
        with little_memory():
            EvalTransform(clip_processor(224))(read_image(Image.new("RGB", size)))
        print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_the_longest_image_that_is_accepted_takes_little_memory(tmp_path):
    """Resized by its shorter side and cropped afterwards, it is 89,600 pixels long."""
    forked.run(tmp_path / "log", prepare_longest, [(MAX_ASPECT, 1), (1, MAX_ASPECT), (8000, 40), (40, 8000)])


def test_the_limit_is_that_of_pillow(monkeypatch):
    """Who has larger images raises it where everybody does."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageError, match="at most 50 pixels, got 10 x 10"):
        preprocessing()(noise_image(10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert preprocessing()(noise_image(10, 10)).shape == (3, 32, 32)
