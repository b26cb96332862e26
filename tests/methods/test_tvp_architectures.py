"""TVP on each of the 12 multimodal architectures: tiles, padding images and packed patches included."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_vlm.adapters.pixel_prompt import shrink_into_window
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.methods.tvp import TVPConfig, prompt_of, set_normalization, without_prompt
from peft_vlm.models.vision import patch_embedding_of
from tests.tiny import noise_image
from tests.tiny_mllm import ARCHITECTURES, TinyMLLM, tiny_mllm

IMAGES = [noise_image(60, 40, seed=0), noise_image(60, 40, seed=1)]
PACKED = ("qwen2_vl", "qwen2_5_vl")


@pytest.fixture(params=sorted(ARCHITECTURES))
def name(request) -> str:
    return request.param


def with_prompt(mllm: TinyMLLM, *, size: float = 0.0, **settings) -> PeftModel:
    """A model with a prompt of random values of some size."""
    config = TVPConfig.for_processor(mllm.image_processor, **({"canvas_size": 32, "border": 5} | settings))
    model = get_peft_model(mllm.model, config).eval()
    generator = torch.Generator().manual_seed(5)
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    prompt.data += size * torch.randn(prompt.shape, generator=generator)
    return model


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def pictures_seen(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the patch embedding of a model gets, as images."""
    seen = []
    module = patch_embedding_of(model).module
    convolution = next(m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    handle = convolution.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    logits_of(model, inputs)
    handle.remove()
    if "image_grid_thw" not in inputs:
        return torch.cat(seen)
    return unpacked(seen[0], inputs["image_grid_thw"].tolist())


def unpacked(patches: Tensor, grids: list[list[int]]) -> Tensor:
    """Images out of the patches (n, 3, 2, side, side) of images of one size, one patch at a time."""
    pictures, next_patch, side = [], 0, patches.shape[-1]
    for frames, rows, cols in grids:
        assert frames == 1
        frame = torch.full((2, 3, rows * side, cols * side), torch.nan)
        for top in range(0, rows, 2):
            for left in range(0, cols, 2):
                for row, col in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    y, x = (top + row) * side, (left + col) * side
                    frame[:, :, y : y + side, x : x + side] = patches[next_patch].transpose(0, 1)
                    next_patch += 1
        pictures.append(frame)
    return torch.cat(pictures)


def test_there_are_twelve_architectures():
    assert len(ARCHITECTURES) == 12


def test_the_image_decides_the_output(name):
    """Otherwise every other test here would pass on models that do not look."""
    mllm = tiny_mllm(name)
    first, second = mllm.inputs(IMAGES), mllm.inputs(IMAGES[::-1])
    assert (logits_of(mllm.model, first) - logits_of(mllm.model, second)).abs().max() > 1e-3


@pytest.mark.parametrize("shrink", ["none", "processor"])
def test_a_zero_prompt_changes_nothing_where_the_model_does_not_shrink(name, shrink):
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    expected = logits_of(mllm.model, inputs)
    assert torch.equal(logits_of(with_prompt(mllm, shrink=shrink), inputs), expected)


def test_a_zero_prompt_changes_nothing_but_the_shrinking(name):
    """Every image that reaches the convolution is the base model's, shrunk; nothing is left out or moved."""
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    full = pictures_seen(mllm.model, inputs)
    model = with_prompt(mllm)
    settings = model.peft_config["default"].pixel_settings
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.image_mean, settings.image_std))
    expected = (shrink_into_window(full * std + mean, settings) - mean) / std
    seen = pictures_seen(model, inputs)
    assert len(seen) >= len(IMAGES)
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-6)


def test_the_prompt_lies_on_every_image_where_it_should(name):
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    model = with_prompt(mllm, size=0.5)
    with without_prompt(model):
        clean = pictures_seen(model, inputs)
    rows, cols = clean.shape[-2:]
    added = nn.functional.interpolate(
        prompt_of(model)[None], size=(rows, cols), mode="bilinear", antialias=True, align_corners=False
    )
    std = torch.tensor(model.peft_config["default"].image_std).view(3, 1, 1)
    expected = clean + added / std
    torch.testing.assert_close(pictures_seen(model, inputs), expected, rtol=0, atol=5e-6)


def test_pixel_gradients_reach_the_prompt(name):
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    model = with_prompt(mllm, size=0.1).train()
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    model(**inputs, labels=labels).loss.backward()
    with_gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ((only, gradient),) = with_gradient.items()
    assert only.endswith("tvp_prompt.default")
    mask = model.peft_config["default"].pixel_settings.mask().bool().expand_as(gradient)
    assert (gradient[mask] != 0).float().mean() > 0.95
    assert (gradient[~mask] != 0).float().mean() > 0.95  # the official norm is over the whole canvas


def test_recomputed_activations_and_half_precision_keep_the_gradient(name):
    """Training a prompt on a large model needs both; only what the layers do with the pixels may be rounded."""
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    gradients = []
    for checkpointing, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        model = with_prompt(tiny_mllm(name), size=0.1).train()
        (prompt,) = (p for p in model.parameters() if p.requires_grad)
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        model.get_base_model().to(dtype)
        prompt.data = prompt.data.float()
        columns = {key: value.to(dtype) if key == "pixel_values" else value for key, value in inputs.items()}
        model(**columns, labels=labels, use_cache=False).loss.backward()
        assert prompt.grad.dtype == torch.float32
        gradients.append(prompt.grad.flatten())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert nn.functional.cosine_similarity(gradients[2], gradients[0], dim=0) > 0.9


def test_generate_works_and_disabling_is_exact(name):
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    expected = logits_of(mllm.model, inputs)
    settings = {"max_new_tokens": 4, "do_sample": False}
    words = mllm.model.generate(**inputs, **settings)
    model = with_prompt(mllm, size=2.0)
    assert (logits_of(model, inputs) - expected).abs().max() > 1e-3
    prompted = model.generate(**inputs, **settings)
    assert prompted.shape == words.shape
    # the prompt takes part in generation: greedy decoding by hand gives the same first word
    assert torch.equal(prompted[:, -4], logits_of(model, inputs)[:, -1].argmax(dim=-1))
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), expected)
        assert torch.equal(model.generate(**inputs, **settings), words)


def test_saving_and_loading_is_exact(name, tmp_path):
    mllm = tiny_mllm(name)
    inputs = mllm.inputs(IMAGES)
    model = with_prompt(mllm, size=0.5)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_mllm(name).model, tmp_path, adapter_name="other")
    assert torch.equal(logits_of(again, inputs), expected)
    assert torch.equal(prompt_of(again), prompt_of(model))


def test_a_prompt_moves_to_another_architecture_of_another_image_size(name, tmp_path, caplog):
    """Trained on a LLaVA of 32 px (on the BLIP-2 of 24 px for those that have 32 px too), used elsewhere."""
    source = tiny_mllm("blip_2" if tiny_mllm_size(name) == 32 else "llava")
    model = with_prompt(source, size=0.5, canvas_size=28, border=4)
    model.save_pretrained(tmp_path)
    target = tiny_mllm(name)
    inputs = target.inputs(IMAGES)
    with pytest.warns(PeftVLMWarning, match=r"set_normalization\(model, processor\)"):
        moved = PeftModel.from_pretrained(target.model, tmp_path)
    assert "its canvas of 28 px is resized to" in caplog.text
    assert torch.equal(prompt_of(moved), prompt_of(model))
    set_normalization(moved, target.image_processor)
    with without_prompt(moved):
        clean = logits_of(moved, inputs)
    assert (logits_of(moved, inputs) - clean).abs().max() > 1e-3
    direct = with_prompt(tiny_mllm(name), canvas_size=28, border=4)
    (prompt,) = (p for p in direct.parameters() if p.requires_grad)
    prompt.data.copy_(prompt_of(model))
    assert torch.equal(logits_of(moved, inputs), logits_of(direct, inputs))
    assert moved.generate(**inputs, max_new_tokens=2).shape[0] == len(IMAGES)


def tiny_mllm_size(name: str) -> int | None:
    """Rows of the images of a tiny model."""
    size = ARCHITECTURES[name].settings()["vision_config"].get("image_size")
    return size[0] if isinstance(size, list) else size
