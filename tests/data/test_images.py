"""Opening images: every mode becomes RGB as documented, every damaged file is named."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vlm.data import read_image
from peft_vlm.errors import DataError
from peft_vlm.serving import images as serving_images
from tests.tiny import noise_image


def as_bytes(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    """A path with spaces and other scripts, bytes, an undecoded `datasets` cell, PIL and numpy are the same image."""
    image = noise_image(7, 5)
    path = tmp_path / "ein Bild mit Umlaut \u00e4 \u732b.png"
    image.save(path)
    data = as_bytes(image)
    cells = ({"bytes": data, "path": "x.png"}, {"bytes": None, "path": str(path)})
    for source in (path, str(path), data, *cells, image, np.asarray(image)):
        assert read_image(source).mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_rgb_and_say_so_once(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """PIL's own conversion; the note must not come once per image."""
    image = noise_image(6, 4, mode=mode)
    with caplog.at_level(logging.INFO, logger="peft_vlm"):
        for _ in range(3):
            np.testing.assert_array_equal(np.asarray(read_image(image)), np.asarray(image.convert("RGB")))
    assert [record.getMessage() for record in caplog.records] == [
        f"images of mode {mode} are converted to RGB (said once)"
    ]


def test_transparent_pixels_are_white(caplog: pytest.LogCaptureFixture) -> None:
    """PIL drops the alpha channel instead, which shows whatever colour the transparent pixels hide, often black."""
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 100, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    with caplog.at_level(logging.INFO, logger="peft_vlm"):
        pixels = np.asarray(read_image(image))[0].tolist()
    assert pixels == [[255, 255, 255], [200, 100, 0], [127, 127, 127]]
    assert "laid over white" in caplog.text


def test_grey_and_palette_images_with_transparency_are_laid_over_white() -> None:
    """Transparency also hides in `LA`, and as one palette or RGB colour in PNG and GIF files."""
    grey = Image.new("LA", (1, 1), (0, 0))
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([0, 0, 0] * 256)
    data = as_bytes(palette, transparency=3)
    rgb = as_bytes(Image.new("RGB", (1, 1), (0, 0, 0)), transparency=(0, 0, 0))
    for source in (grey, data, rgb):
        assert np.asarray(read_image(source)).tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    """PIL clips 16-bit values at 255, which turns nearly every pixel white."""
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    for source in (image, as_bytes(image)):
        assert np.asarray(read_image(source))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_photos_are_turned_upright() -> None:
    """Phones store the orientation beside the pixels; ignoring it shows the model an image lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(as_bytes(noise_image(8, 4), "JPEG", exif=exif)).size == (4, 8)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message must say which file of which image."""
    with pytest.raises(DataError, match=r"image 3 \(file '.*no such.png'\) does not exist. Check the path"):
        read_image(tmp_path / "no such.png", where="image 3")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow comments on what it reads before it gives up
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_damaged_file_is_a_data_error_wherever_it_is_cut(file_format: str) -> None:
    """PIL raises OSError, SyntaxError, ValueError or struct.error by format and place; all must name the image."""
    data = as_bytes(noise_image(16, 16), file_format)
    failures = 0
    for length in range(0, len(data) - 8, max(1, len(data) // 60)):
        for damaged in (data[:length], data[:length] + b"\xff\x00\x13" * 9 + data[length + 27 :]):
            try:
                read_image(damaged, where="image 4")
            except DataError as error:
                failures += 1
                assert "image 4 (bytes) cannot be read as an image" in str(error)  # noqa: PT017 - some cuts still open
    assert failures > 20


def test_an_image_without_pixels_is_refused() -> None:
    """A resize of it would divide by zero somewhere in PIL."""
    with pytest.raises(DataError, match=r"has no pixels: its size is \(0, 5\)"):
        read_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((4, 4, 3)), "uint8 array of shape .*got float64 of shape .*Scale to 0..255"),
        (np.zeros((3, 4, 5), dtype=np.uint8), "put the channels last"),
        (7, "Expected an image as a path, bytes, PIL image or numpy array, got int"),
        ({"bytes": None, "path": None}, "got dict"),
    ],
)
def test_what_is_no_image_is_refused(value: object, message: str) -> None:
    """Guessing the layout of an array would show the model noise."""
    with pytest.raises(DataError, match=message):
        read_image(value)


@pytest.mark.parametrize("file_format", serving_images.RASTER_FORMATS)
def test_every_raster_format_is_known_by_its_content(file_format: str, tmp_path: Path) -> None:
    """The name decides nothing: a list that differs from what is opened loses files silently."""
    data = as_bytes(noise_image(16, 16), file_format)
    (tmp_path / "no ending").write_bytes(data)
    assert read_image(tmp_path / "no ending").size == (16, 16)
    assert serving_images.is_raster_image(data[:16])
    assert len(serving_images.RASTER_FORMATS) == 9


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"BMI of 12 cats", b""]
)
def test_vector_and_foreign_formats_are_never_opened(head: bytes, tmp_path: Path) -> None:
    """Pillow starts Ghostscript on whatever begins like PostScript, also where the file is called x.png."""
    (tmp_path / "x.png").write_bytes(head + bytes(64))
    assert not serving_images.is_raster_image(head)
    for source in (tmp_path / "x.png", head + bytes(64)):
        with pytest.raises(DataError, match="cannot be read as an image: (its content is no image|Unsupported BMP)"):
            read_image(source)
