"""The pixel prompt: where it lies, how it is added, what it does to other models; equations by hand."""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel, CLIPImageProcessor

from peft_vlm.adapters.pixel_prompt import PixelSettings, prompted_images, window_of
from peft_vlm.errors import AdapterError, DataError, PeftVLMWarning, UnsupportedModelError
from peft_vlm.methods.tvp import (
    TVPConfig,
    prompt_layer_of,
    prompt_of,
    render_prompt,
    set_normalization,
    share_prompt,
    without_prompt,
)
from peft_vlm.models.vision import input_size_of, patch_embedding_of
from tests.cases import class_prompts, pixels
from tests.tiny import clip_processor, siglip_processor, tiny_clip, tiny_siglip

HALF = (0.5, 0.5, 0.5)


def settings(**own) -> PixelSettings:
    """A canvas of 4 px with a border of 1 px."""
    base = {"canvas_size": 4, "border": 1, "shape": "border", "patch_size": None, "shrink": "none", "clamp": False}
    return PixelSettings(**(base | {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.5, 0.25, 0.2)} | own))


def with_prompt(model: nn.Module | None = None, *, size: float = 0.5, **own) -> PeftModel:
    """A tiny CLIP of 16 px with a random prompt on a canvas of 16 px."""
    config = TVPConfig.for_processor(clip_processor(), **({"canvas_size": 16, "border": 3} | own))
    model = get_peft_model(model or tiny_clip(), config).eval()
    parameter_of(model).data.normal_(std=size)
    return model


def parameter_of(model: PeftModel) -> nn.Parameter:
    return prompt_layer_of(model).prompts["default"]


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image


def test_the_prompt_is_added_in_pixel_units():
    """x' = x + prompt / std: forgetting std makes a prompt act five times weaker or stronger on another model."""
    images = torch.arange(48.0).view(1, 3, 4, 4)
    prompt = torch.full((3, 4, 4), 0.1)
    expected = images + torch.tensor([0.2, 0.4, 0.5]).view(3, 1, 1)
    assert_close(prompted_images(images, prompt, settings()), expected)


def test_the_image_shrinks_into_the_window_on_black():
    """A constant image stays constant inside and becomes black, in pixel units, outside."""
    own = settings(shrink="model")
    mean, std = torch.tensor(own.image_mean).view(3, 1, 1), torch.tensor(own.image_std).view(3, 1, 1)
    images = (torch.full((2, 3, 4, 4), 0.6) - mean) / std
    seen = prompted_images(images, None, own) * std + mean
    expected = torch.zeros(2, 3, 4, 4)
    expected[:, :, 1:3, 1:3] = 0.6
    assert_close(seen, expected, rtol=0, atol=1e-6)


def test_shrinking_agrees_with_pillow():
    """Bicubic with antialiasing, as the official transform: within one grey level of Pillow, which rounds twice.

    Medium tones only: Pillow also cuts what overshoots white or black after its first pass, over the columns.
    """
    own = settings(canvas_size=224, border=30, shrink="model", image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    picture = np.random.default_rng(0).integers(80, 176, (224, 224, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(picture).resize((164, 164), Image.Resampling.BICUBIC))
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    seen = prompted_images(images, None, own)[0, :, 30:194, 30:194].permute(1, 2, 0)
    assert_close(seen, torch.from_numpy(small.copy()).float() / 255, rtol=0, atol=1.1 / 255)


@pytest.mark.parametrize(("size", "expected"), [(224, (30, 164)), (336, (45, 246)), (48, (6, 36)), (2, (0, 2))])
def test_the_window_scales_with_the_input(size, expected):
    assert window_of(size, settings(canvas_size=224, border=30)) == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]),
        ({"shape": "full"}, [[1] * 4] * 4),
        ({"shape": "patch", "patch_size": 2}, [[0] * 4, [0] * 4, [0, 0, 1, 1], [0, 0, 1, 1]]),
    ],
)
def test_shapes(own, expected):
    assert settings(**own).mask().tolist() == [expected]


def test_what_lies_outside_the_shape_never_acts_but_gets_its_gradient():
    """The official step divides by the norm over the whole canvas; other optimizers must not paint the centre."""
    model = with_prompt()
    before = logits_of(model)
    parameter, mask = parameter_of(model), prompt_layer_of(model).settings["default"].mask().bool()
    model(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image.square().sum().backward()
    assert (parameter.grad[~mask.expand_as(parameter)] != 0).all()
    torch.optim.AdamW([parameter], lr=0.1).step()
    moved = parameter.detach().clone()
    assert not torch.equal(logits_of(model), before)
    parameter.data[~mask.expand_as(parameter)] = 7.0
    after = logits_of(model)
    parameter.data.copy_(moved)
    assert torch.equal(after, logits_of(model))
    assert (prompt_of(model)[~mask.expand_as(parameter)] == 0).all()


def test_clamping_cuts_the_value_and_not_the_gradient():
    """A plain clamp would stop learning wherever the prompt has left the range once."""
    own = settings(clamp=True, shape="full", image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    prompt = torch.full((3, 4, 4), 0.8, requires_grad=True)
    seen = prompted_images(torch.full((1, 3, 4, 4), 0.5), prompt, own)
    assert_close(seen, torch.ones(1, 3, 4, 4))
    seen.sum().backward()
    assert_close(prompt.grad, torch.ones(3, 4, 4))
    loose = prompted_images(torch.full((1, 3, 4, 4), 0.5), prompt, settings(shape="full"))
    assert float(loose.detach().max()) > 1.3


@pytest.mark.parametrize("shrink", ["none", "processor"])
@pytest.mark.parametrize("clamp", [False, True])
def test_a_zero_prompt_is_no_prompt(shrink, clamp):
    assert torch.equal(logits_of(with_prompt(size=0.0, shrink=shrink, clamp=clamp)), logits_of(tiny_clip()))


def test_half_precision_images_are_prompted_in_float32_and_rounded_once():
    """Un-normalising, adding and normalising in bf16 would round the image three times."""
    model = with_prompt()
    layer = prompt_layer_of(model)
    image = pixels().bfloat16()
    seen = layer.prompted(image)
    assert seen.dtype == torch.bfloat16
    exact = prompted_images(image.float(), prompt_of(model), layer.settings["default"])
    assert torch.equal(seen, exact.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.prompted(image.float()), exact)


def test_without_prompt_keeps_the_shrinking():
    model = with_prompt()
    empty = with_prompt(size=0.0)
    with without_prompt(model):
        assert torch.equal(logits_of(model), logits_of(empty))
    assert not torch.equal(logits_of(model), logits_of(empty))
    with pytest.raises(ZeroDivisionError), without_prompt(model):
        raise ZeroDivisionError
    assert not torch.equal(logits_of(model), logits_of(empty))


def test_functions_on_a_model_without_a_prompt_say_so():
    for function in (prompt_of, render_prompt, prompt_layer_of):
        with pytest.raises(AdapterError, match="with a pixel prompt, got `CLIPModel` without"):
            function(tiny_clip())


def test_a_shared_prompt_is_one_parameter_on_two_models():
    """Gradients of both models add up in it, and one step moves both."""
    source = with_prompt(shrink="none")
    other = share_prompt(source, tiny_siglip(), processor=siglip_processor())
    assert parameter_of(other) is parameter_of(source)
    assert other.peft_config["default"].image_std == [0.5, 0.5, 0.5]
    ids = torch.randint(3, 400, (2, 24))
    gradients = []
    for models in ((source,), (other,), (source, other)):
        parameter_of(source).grad = None
        for model in models:
            inputs = ids if model is other else class_prompts().input_ids
            model(pixel_values=pixels(), input_ids=inputs).logits_per_image.sum().backward()
        gradients.append(parameter_of(source).grad.clone())
    assert_close(gradients[2], gradients[0] + gradients[1])
    assert sum(p.requires_grad for p in other.parameters()) == 1


def test_sharing_needs_to_know_the_other_models_normalisation():
    with pytest.raises(AdapterError, match=r"TVPConfig\.for_processor\(processor\)"):
        share_prompt(with_prompt(), tiny_siglip())


def test_the_image_of_a_prompt_has_grey_for_zero():
    model = with_prompt(size=0.0)
    parameter_of(model).data[0, 0, 0], parameter_of(model).data[2, 15, 15] = 1.0, -1.0
    picture = np.asarray(render_prompt(model, limit=1.0))
    assert picture.shape == (16, 16, 3)
    assert picture[0, 0].tolist() == [255, 128, 128]
    assert picture[15, 15].tolist() == [128, 128, 0]
    assert (picture[3:13, 3:13] == 128).all()
    with pytest.raises(ValueError, match="above 0, got 0"):
        render_prompt(model, limit=0.0)


def test_the_patch_embedding_is_found_and_stays_found():
    found = patch_embedding_of(tiny_clip())
    assert (found.name, found.kind) == ("vision_model.embeddings.patch_embedding", "image")
    again = patch_embedding_of(with_prompt())
    assert again.name == found.name
    assert isinstance(again.module, type(prompt_layer_of(with_prompt())))
    assert input_size_of(tiny_clip()) == (16, 16)


def test_models_without_or_with_several_ways_in_are_refused():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    config = TVPConfig(image_mean=list(HALF), image_std=list(HALF))
    with pytest.raises(UnsupportedModelError, match="in `BertModel`, got none. Text models have none"):
        get_peft_model(bert, config)
    twice = tiny_clip()
    twice.second_eye = nn.Conv2d(3, 4, 2)
    with pytest.raises(UnsupportedModelError, match=r"got 2: vision_model\S+patch_embedding, second_eye"):
        get_peft_model(twice, config)
    video = nn.Module()
    video.proj = nn.Conv3d(3, 4, 2)
    with pytest.raises(UnsupportedModelError, match="gets `grid_thw`"):
        patch_embedding_of(video)


def test_the_same_architecture_takes_the_prompt_in_silence(tmp_path, caplog):
    with_prompt().save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_clip(seed=3), tmp_path)
    assert not caplog.records


def test_another_models_own_normalisation_is_found_beside_it(tmp_path):
    """A prompt added with the wrong standard deviation acts stronger or weaker, which nothing would show."""
    with_prompt(size=1.0).save_pretrained(tmp_path / "prompt")
    tiny_siglip().save_pretrained(tmp_path / "model")
    siglip_processor().save_pretrained(tmp_path / "model")
    base = type(tiny_siglip()).from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "prompt")
    assert prompt_layer_of(model).settings["default"].image_std == HALF
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")


def test_unknown_normalisation_is_a_warning_that_says_how_to_set_it(tmp_path):
    with_prompt().save_pretrained(tmp_path)
    with pytest.warns(PeftVLMWarning, match=r"call `set_normalization\(model, processor\)`"):
        model = PeftModel.from_pretrained(tiny_siglip(), tmp_path)
    assert prompt_layer_of(model).settings["default"].image_std != HALF
    set_normalization(model, siglip_processor())
    assert prompt_layer_of(model).settings["default"].image_std == HALF
    assert model.peft_config["default"].image_mean == [0.5, 0.5, 0.5]


def test_a_configuration_without_normalisation_is_refused():
    with pytest.raises(AdapterError, match=r"`TVPConfig\.for_processor\(processor\)`"):
        get_peft_model(tiny_clip(), TVPConfig(canvas_size=16, border=3))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"do_rescale": False}, "rescales pixels to \\[0, 1\\] first"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
    ],
)
def test_processors_without_pixels_in_the_unit_range_are_refused(own, message):
    with pytest.raises(DataError, match=message):
        TVPConfig.for_processor(CLIPImageProcessor(**own))


def test_a_processor_without_mean_and_std_is_refused():
    processor = CLIPImageProcessor()
    processor.image_mean = None
    with pytest.raises(DataError, match=r"with `image_mean` and `image_std`, got `CLIPImageProcessor\w*` with None"):
        TVPConfig.for_processor(processor)
    with pytest.raises(DataError, match="image processor with a mean"):
        TVPConfig.for_processor("openai/clip-vit-base-patch16")
    plain = TVPConfig.for_processor(CLIPImageProcessor(do_normalize=False))
    assert (plain.image_mean, plain.image_std) == ([0.0] * 3, [1.0] * 3)
