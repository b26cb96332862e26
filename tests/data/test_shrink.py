"""Images shrunk before the processor: where they lie, which are refused, and that the processor stays itself."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaProcessor

from peft_vlm.data.shrink import ShrinkingProcessor, normalization_of, shrunken_image
from peft_vlm.errors import DataError
from tests.tiny import clip_processor, noise_image, siglip_processor
from tests.tiny_mllm import mllm_tokenizer


def test_the_processor_gets_the_image_in_a_window_on_black():
    """As the official code: bicubic to the window, zeros around it in [0, 1], then normalised."""
    image = noise_image(40, 40)
    pixels = ShrinkingProcessor(clip_processor(16), canvas_size=16, border=3)(image, return_tensors="pt")[
        "pixel_values"
    ]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in normalization_of(clip_processor()))
    small = np.asarray(image.resize((10, 10), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    expected = torch.zeros(3, 16, 16)
    expected[:, 3:13, 3:13] = torch.from_numpy(small).permute(2, 0, 1)
    torch.testing.assert_close(pixels[0], (expected - mean) / std, rtol=0, atol=1e-5)


def test_the_middle_of_a_long_image_is_kept():
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    window = np.asarray(shrunken_image(image, canvas_size=16, border=3))[3:13, 3:13]
    assert (window[:, 2:8] == (0, 0, 255)).all()


def test_small_images_are_refused_or_enlarged_on_request():
    with pytest.raises(DataError, match=r"10x10 px or more for the window.*got 9x40. .*`upscale=True`"):
        shrunken_image(noise_image(9, 40), canvas_size=16, border=3)
    assert shrunken_image(noise_image(9, 40), canvas_size=16, border=3, upscale=True).size == (16, 16)


def test_a_border_without_a_window_is_refused():
    with pytest.raises(ValueError, match="below half of `canvas_size`=16, got 8"):
        ShrinkingProcessor(clip_processor(), canvas_size=16, border=8)


def test_a_canvas_of_another_size_is_resized_by_the_processor():
    pixels = ShrinkingProcessor(clip_processor(16), canvas_size=32, border=6)(noise_image(40, 40))["pixel_values"]
    assert pixels[0].shape == (3, 16, 16)


def test_everything_else_is_the_processors_own():
    inner = siglip_processor(16)
    processor = ShrinkingProcessor(inner, canvas_size=16, border=3)
    assert processor.size == inner.size
    assert processor.to_dict() == inner.to_dict()
    assert normalization_of(processor) == ((0.5,) * 3, (0.5,) * 3)
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        image = noise_image(20, 20)
        assert np.array_equal(twin(image)["pixel_values"], processor(image)["pixel_values"])


def test_processors_of_text_and_images_shrink_too_also_in_chat_templates():
    """A chat template calls the processor from inside, where a wrapper around it would be by-passed."""
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    )
    template += "{% endfor %}{% endfor %}"
    own = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    whole = LlavaProcessor(clip_processor(16), mllm_tokenizer(), chat_template=template, **own)
    processor = ShrinkingProcessor(whole, canvas_size=16, border=3)
    image = noise_image(40, 40)
    expected = ShrinkingProcessor(clip_processor(16), canvas_size=16, border=3)(image)["pixel_values"]
    batch = processor(images=[image], text="<image>hi", return_tensors="np")
    assert np.array_equal(batch["pixel_values"], expected)
    assert batch["input_ids"].shape == (1, 4 + 2)
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "hi"}]}
    chat = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="np")
    assert np.array_equal(chat["pixel_values"], expected)
    assert not np.array_equal(whole(images=image, text="<image>", return_tensors="np")["pixel_values"], expected)
    assert processor(text="hi")["input_ids"] == whole(text="hi")["input_ids"]


def test_tiles_are_refused():
    """The border of the whole image is not a border of each tile, but the model would add the prompt to each."""
    tiled = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[32, 32]]
    )
    with pytest.raises(DataError, match="one output per image, got 5 of 1 images: .*Switch tiles off"):
        ShrinkingProcessor(tiled, canvas_size=32, border=6)(noise_image(40, 40), return_tensors="pt")
