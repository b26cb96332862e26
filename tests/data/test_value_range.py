"""Images of more than 8 bits: one range for all of them, said or clear, kept from training to serving."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset as HFDataset
from PIL import Image

from peft_vlm.data import (
    EvalTransform,
    ImageClassificationDataset,
    images,
    load_image_dataset,
    load_image_stream,
    load_unlabelled_images,
    read_image,
)
from peft_vlm.data.images import top_of
from peft_vlm.errors import DataError
from peft_vlm.export.classifier import preprocessing_of
from peft_vlm.serving.card import ClassifierCard
from peft_vlm.serving.images import Preprocessing
from tests.tiny import clip_processor

RAMP = np.arange(16, dtype=np.float64).reshape(4, 4) / 15


def as_file(values: np.ndarray, file_format: str = "TIFF") -> bytes:
    """An image file of numbers."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, file_format)
    return buffer.getvalue()


def grey(source: object, **options: object) -> np.ndarray:
    """What a model sees of an image, one channel."""
    pixels = np.asarray(read_image(source, **options))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


EIGHT_BITS = (RAMP * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    "source",
    [
        as_file(RAMP.astype(np.float32)),
        Image.fromarray(RAMP.astype(np.float32)),
        as_file((RAMP * 65535).round().astype(np.uint16), "PNG"),
        as_file((RAMP * 65535).round().astype(np.uint16), "PPM"),
        as_file((RAMP * (2**31 - 1)).astype(np.int32)),
        as_file(EIGHT_BITS),
    ],
    ids=["float", "float image", "PNG", "PPM", "int32", "uint8"],
)
def test_types_with_one_meaning_are_taken_by_it(source: object) -> None:
    """Decimal numbers and 32-bit integers came out black."""
    assert np.abs(grey(source).astype(int) - EIGHT_BITS).max() <= 1


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        ((RAMP * 4095).round().astype(np.uint16), (0, 4095)),
        ((RAMP * 255).round().astype(np.uint16), (0, 255)),
        ((RAMP * 255).round().astype(np.int32), (0, 255)),
        ((RAMP * 2000 - 1000).astype(np.float32), (-1000, 1000)),
        ((RAMP * 255).astype(np.float32), (0.0, 255.0)),
    ],
)
def test_other_numbers_have_the_range_that_is_said(values: np.ndarray, value_range: tuple[float, float]) -> None:
    """12-bit images came out nearly black, 8 bits in wider types wholly so."""
    pixels = grey(as_file(values), value_range=value_range)
    assert np.abs(pixels.astype(int) - EIGHT_BITS).max() <= 1
    assert grey(Image.fromarray(EIGHT_BITS), value_range=value_range).tolist() == EIGHT_BITS.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP * 255).astype(np.float32), "holds numbers from 0 to 255, beyond 0 to 1. Pass `value_range="),
        (np.full((2, 2), np.nan, np.float32), "not all finite"),
        ((RAMP * 255).astype(np.uint16), "holds numbers from 0 to 255, all black where 65535 is white"),
        ((RAMP * 65535).astype(np.int32), "all black where 2.14748e.09 is white"),
        ((RAMP * 100 - 50).astype(np.int32), "holds numbers from -50 to 50"),
    ],
)
def test_numbers_that_fit_no_range_are_refused(values: np.ndarray, message: str) -> None:
    """The range is never guessed from one image, and no image is silently black."""
    with pytest.raises(DataError, match=rf"image 3 \(bytes\) .*{message}"):
        read_image(as_file(values), where="image 3")


def test_deep_colours_are_not_silently_black() -> None:
    """Pillow keeps the upper half of 16 bits a channel: 8-bit values in such files are gone."""

    def png(scale: int) -> bytes:
        import struct
        import zlib

        rows = b"".join(b"\0" + (RAMP[row] * scale).astype(">u2").repeat(3).tobytes() for row in range(4))
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
        parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    assert np.abs(grey(png(65535)).astype(int) - EIGHT_BITS).max() <= 1
    assert grey(png(65535), value_range=(0, 65535)).max() == 255
    with pytest.raises(DataError, match="16-bit colours, of which only the upper half is read"):
        read_image(png(255))
    with pytest.raises(DataError, match=r"value_range`=\(0.0, 4095.0\) does not fit. Convert the files"):
        read_image(png(4095), value_range=(0, 4095))
    dataset = ImageClassificationDataset([{"image": png(4095), "label": 0}], ["a", "b"])
    with pytest.raises(DataError, match="numbers up to .* in a type that reaches 65535"):
        dataset.check_pixels()


def deep(top: int, kind: type = np.uint16, count: int = 3, **options: object) -> ImageClassificationDataset:
    """Images whose highest number differs, up to one."""
    rows = [
        {"image": as_file((RAMP * top * (index + 1) / count).round().astype(kind)), "label": 0}
        for index in range(count)
    ]
    return ImageClassificationDataset(rows, ["a", "b"], **options)


@pytest.mark.parametrize(
    ("top", "kind", "likely"), [(4095, np.uint16, 4095), (1000, np.uint16, 1023), (255, np.int32, 255)]
)
def test_training_images_that_leave_white_open_are_refused(top: int, kind: type, likely: int) -> None:
    """12 bits in a 16-bit file: nearly black, and nothing said so."""
    message = rf"numbers up to {top} in a type that reaches .*Pass `value_range=\(0, {likely}\)`"
    with pytest.raises(DataError, match=message):
        deep(top, kind).check_pixels()
    deep(top, kind, value_range=(0, likely)).check_pixels()
    deep(top, kind, value_range=(0, 65535)).check_pixels()
    deep(60000).check_pixels()


def test_a_range_that_nothing_needs_or_that_is_too_small_is_refused() -> None:
    """A setting that is not used stands for a mistake."""
    plain = ImageClassificationDataset([{"image": EIGHT_BITS, "label": 0}], ["a", "b"], value_range=(0, 4095))
    with pytest.raises(DataError, match="all images have 8 or less. Leave it out"):
        plain.check_pixels()
    with pytest.raises(DataError, match=r"numbers up to 5000, beyond `value_range`=\(0.0, 4095.0\)"):
        deep(5000, value_range=(0, 4095)).check_pixels()
    for wrong in ((0,), (1, 0), (0, float("inf")), (0, 1, 2)):
        with pytest.raises(DataError, match=r"Expected `value_range` as \(black, white\)"):
            deep(5000, value_range=wrong)


def test_every_source_takes_a_range(tmp_path: Path) -> None:
    """Folders, unlabelled images, tables, streams, subsets."""
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.tif").write_bytes(as_file((RAMP * 4095).round().astype(np.uint16)))
    transform, expected = EvalTransform(clip_processor()), EvalTransform(clip_processor())(read_image(EIGHT_BITS))
    options = {"transform": transform, "value_range": [0, 4095]}
    cells = [{"bytes": (tmp_path / label / "1.tif").read_bytes(), "path": None} for label in "ab"]
    table = HFDataset.from_dict({"image": cells, "label": ["a", "b"]})
    for dataset in (
        load_image_dataset(tmp_path, **options).select([1]),
        load_unlabelled_images(tmp_path, ["a", "b"], **options),
        load_image_stream(table, class_names=["a", "b"], num_images=2, **options),
    ):
        dataset.check_pixels()
        pixels = next(iter(dataset))["pixel_values"]
        assert (pixels - expected).abs().max() < 0.1


def test_an_exported_classifier_keeps_the_range() -> None:
    """It would see nearly black images; cards without a range are as before."""
    preprocessing = preprocessing_of(clip_processor(), (0.0, 4095.0))
    card = ClassifierCard(("a",), preprocessing, {})
    read = ClassifierCard.from_json(card.to_json(), where="x").preprocessing
    assert read == preprocessing
    twelve = as_file((RAMP * 4095).round().astype(np.uint16))
    plain: Preprocessing = preprocessing_of(clip_processor())
    np.testing.assert_allclose(read(twelve), plain(as_file(EIGHT_BITS)), atol=0.1)
    assert "value_range" not in json.loads(ClassifierCard(("a",), plain, {}).to_json())["preprocessing"]
    with pytest.raises(ValueError, match="all black where 65535 is white"):
        plain(as_file((RAMP * 200).astype(np.uint16)))


def test_the_range_check_leaves_out_images_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named when they are needed; an error of our own in the check must not pass for one of them."""
    cells = [as_file(RAMP.astype(np.float32)), b"damaged", as_file(RAMP.astype(np.float32))[:40], "/no/such.png", 3]
    assert [top_of(cell) for cell in cells] == [(1.0, 1.0), None, None, None, None]
    assert top_of(Image.new("F", (0, 3))) is None

    def broken(image: Image.Image) -> float:
        raise ValueError("a mistake of ours")

    for name in ("white_of", "extrema_of"):
        with monkeypatch.context() as patch:
            patch.setattr(images, name, broken)
            with pytest.raises(ValueError, match="a mistake of ours"):
                top_of(cells[0])
