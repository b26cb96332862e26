"""Transforms: evaluation equals the model's processor, training is random only through its generator."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BaseImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from peft_vlm.data import EvalTransform, ImageTransform, TrainTransform
from peft_vlm.data.transforms import random_crop_box
from peft_vlm.errors import DataError
from tests.tiny import clip_processor, noise_image, siglip_processor

PROCESSORS = {"clip": clip_processor, "siglip": siglip_processor}


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(20, 20), (40, 23), (9, 31), (3, 2), (1, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("family", PROCESSORS)
def test_evaluation_pixels_equal_the_processors(family: str, mode: str, size: tuple[int, int]) -> None:
    """A resize or crop that differs by a pixel costs accuracy and shows nowhere."""
    processor, image = PROCESSORS[family](), noise_image(*size, mode=mode)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    pixels = EvalTransform(processor)(image, generator())
    assert torch.equal(pixels, expected)
    assert pixels.shape == (3, 16, 16)


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_whole_image_unflipped_is_close_to_evaluation(family: str) -> None:
    """Same scale of pixel values, same mean, std and channel order as in evaluation (float32 arithmetic: 1e-5)."""
    processor, image = PROCESSORS[family](), noise_image(33, 33)
    transform = TrainTransform(processor, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_probability=0.0)
    expected = EvalTransform(processor)(image)
    torch.testing.assert_close(transform(image, generator()), expected, rtol=0, atol=1e-5)
    flipped = TrainTransform(processor, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_probability=1.0)(image, generator())
    # Pillow's resize of a mirrored image may round one level of 255 otherwise.
    torch.testing.assert_close(flipped.flip(-1), expected, rtol=0, atol=1.1 / 255 / min(processor.image_std))


def crop_box(size: tuple[int, int], *, scale: tuple[float, float] = (0.08, 1.0), seed: int = 0) -> tuple[int, ...]:
    """A crop with torchvision's default ratios."""
    return random_crop_box(size, scale=scale, ratio=(3 / 4, 4 / 3), generator=generator(seed))


def test_crops_follow_torchvisions_draws() -> None:
    """The rule worked out by hand from the same stream: area, log ratio, then top and left."""
    draws = generator(3)
    area = 100 * 60 * torch.empty(1).uniform_(0.08, 1.0, generator=draws).item()
    aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=draws).item())
    width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    assert height <= 60, "the first draw fits with this seed"
    assert width <= 100
    top = torch.randint(0, 60 - height + 1, (1,), generator=draws).item()
    left = torch.randint(0, 100 - width + 1, (1,), generator=draws).item()
    assert crop_box((60, 100), seed=3) == (top, left, height, width)


def test_crops_cover_the_stated_share_and_ratio() -> None:
    """Areas and log ratios are uniform: their means over many draws are known (three standard errors)."""
    boxes = np.array([crop_box((200, 200), scale=(0.1, 0.5), seed=seed) for seed in range(2000)], dtype=float)
    share = boxes[:, 2] * boxes[:, 3] / 200**2
    log_ratio = np.log(boxes[:, 3] / boxes[:, 2])
    assert share.min() > 0.095
    assert share.max() < 0.505
    assert abs(share.mean() - 0.3) < 3 * (0.4 / 12**0.5) / 2000**0.5
    assert abs(log_ratio.mean()) < 3 * (2 * math.log(4 / 3) / 12**0.5) / 2000**0.5
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 200
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 200


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((9, 9), (0, 0, 9, 9))], ids=str
)
def test_when_no_crop_fits_the_largest_central_one_is_taken(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    """A share of 4 never fits: torchvision's rule for long and for square images."""
    assert random_crop_box(size, scale=(4.0, 4.0), ratio=(3 / 4, 4 / 3), generator=generator()) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)], ids=str)
def test_tiny_images_can_be_augmented(size: tuple[int, int]) -> None:
    """A crop of zero pixels would raise in the middle of training."""
    transform = TrainTransform(clip_processor(), colour_jitter=0.4)
    for seed in range(50):
        assert transform(noise_image(*size), generator(seed)).shape == (3, 16, 16)


def test_training_pixels_depend_on_the_generator_alone() -> None:
    """Randomness from anywhere else would break exact resume."""
    transform, image = TrainTransform(clip_processor(), colour_jitter=0.4), noise_image(30, 30)
    first = transform(image, generator(1))
    torch.manual_seed(123)
    np.random.seed(4)
    assert torch.equal(first, transform(image, generator(1)))
    assert not torch.equal(first, transform(image, generator(2)))


def test_colour_jitter_changes_colours_and_nothing_else() -> None:
    """With a factor of exactly 1 an enhancer is the identity; a uniform grey image has no contrast or saturation."""
    image = Image.new("RGB", (16, 16), (100, 100, 100))
    plain, jittered = (
        TrainTransform(clip_processor(), flip_probability=0.0, colour_jitter=strength)(image, generator(0))
        for strength in (0.0, 0.5)
    )
    assert not torch.equal(plain, jittered)
    levels = (jittered * torch.tensor(clip_processor().image_std).view(3, 1, 1)).add(
        torch.tensor(clip_processor().image_mean).view(3, 1, 1)
    )
    assert (levels * 255).round().unique().numel() == 1


@pytest.mark.parametrize("make", [EvalTransform, TrainTransform])
def test_transforms_state_what_an_adapter_records(make: Callable[[BaseImageProcessor], ImageTransform]) -> None:
    """Mean, std and size go into the adapter; they must be those in use, as JSON numbers."""
    processor = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 12})
    transform = make(processor)
    assert transform.image_size == (16, 12)
    assert transform.image_mean == tuple(processor.image_mean)
    assert transform.image_std == tuple(processor.image_std)
    assert transform(noise_image(30, 30), generator()).shape == (3, 16, 12)


@pytest.mark.parametrize("make", [EvalTransform, TrainTransform])
def test_a_processor_without_rescaling_or_normalisation_is_followed(
    make: Callable[[BaseImageProcessor], ImageTransform],
) -> None:
    """Models with their own normalisation expect pixels in [0, 255] or [0, 1]."""
    white = Image.new("RGB", (20, 20), (255, 255, 255))
    raw = SiglipImageProcessor(size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False)
    assert make(raw)(white, generator()).unique().tolist() == [255]
    unit = SiglipImageProcessor(size={"height": 16, "width": 16}, do_normalize=False)
    assert make(unit)(white, generator()).unique().tolist() == [1]
    assert make(unit).image_std == (1, 1, 1)


def test_a_processor_without_a_fixed_size_is_refused() -> None:
    """Images of different sizes cannot form a batch."""
    with pytest.raises(DataError, match="fixed output size.*switch on `do_center_crop`"):
        EvalTransform(CLIPImageProcessor(do_center_crop=False))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.5)),
        ("ratio", (2.0, 1.0)),
        ("flip_probability", 2.0),
        ("colour_jitter", 1.0),
    ],
)
def test_impossible_settings_are_refused(setting: str, value: object) -> None:
    """The message names the setting and its range."""
    with pytest.raises(ValueError, match=f"Expected `{setting}`"):
        TrainTransform(clip_processor(), **{setting: value})


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
@pytest.mark.parametrize("size", [(16, 16), (20, 16), (31, 24), (90, 41), (17, 60), (8, 9)], ids=str)
def test_evaluation_is_the_papers_resize_and_centre_crop(size: tuple[int, int], resample: Image.Resampling) -> None:
    """By hand, as CoOp's code: the shorter side to the size, the middle of the longer one, in the processor's
    interpolation (bicubic for CLIP; another one costs up to a point of accuracy and shows nowhere).
    """
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, resample=int(resample)
    )
    image, (width, height) = noise_image(*size, seed=3), size
    cols, rows = (16, 16 * height // width) if width <= height else (16 * width // height, 16)
    left, top = (cols - 16) // 2, (rows - 16) // 2
    by_hand = image.resize((cols, rows), resample).crop((left, top, left + 16, top + 16))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    expected = (torch.from_numpy(np.array(by_hand)).permute(2, 0, 1).float() / 255 - mean) / std
    torch.testing.assert_close(EvalTransform(processor)(image), expected, rtol=0, atol=1e-5)
