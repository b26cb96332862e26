"""The prompt that the authors of TVP published, through the converter (see reference/README.md)."""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from peft_vlm.errors import AdapterError, PeftVLMWarning
from peft_vlm.methods.tvp import convert_checkpoint, prompt_of, render_prompt, set_normalization, without_prompt
from tests.parity.recorded import facts, tensors
from tests.tiny import noise_image
from tests.tiny_mllm import ARCHITECTURES, BOS, IMAGE, clip_vision

NAME = "T2_checkpoint_best"


@pytest.fixture
def checkpoint(tmp_path):
    """The file as the official code writes it."""
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"perturbation": tensors(NAME)["perturbation"]}, path)
    return path


def llava_224(*, seed: int = 0) -> LlavaForConditionalGeneration:
    """A random LLaVA that looks at 224 px, as the official models do."""
    settings = ARCHITECTURES["llava"].settings() | {"vision_config": clip_vision(224) | {"patch_size": 14}}
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(LlavaForConditionalGeneration.config_class(**settings)).eval()


def test_canvas_and_border_are_read_off_the_tensor(checkpoint, tmp_path):
    config = convert_checkpoint(checkpoint, tmp_path / "prompt").config
    assert (config.canvas_size, config.border, config.shape, config.clamp) == (224, 30, "border", False)
    assert config.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    size = (tmp_path / "prompt" / "adapter_model.safetensors").stat().st_size
    assert size < 610_000


def test_the_published_prompt_runs_on_a_llava_and_shows_as_an_image(checkpoint, tmp_path):
    convert_checkpoint(checkpoint, tmp_path / "prompt")
    with pytest.warns(PeftVLMWarning, match="set_normalization"):
        model = PeftModel.from_pretrained(llava_224(), tmp_path / "prompt")
    set_normalization(model, CLIPImageProcessor())
    recorded, known = tensors(NAME)["perturbation"], facts(NAME)["facts"]
    assert torch.equal(prompt_of(model), recorded)
    assert float(prompt_of(model).norm()) == pytest.approx(known["l2"], rel=1e-5)
    picture = np.asarray(render_prompt(model))
    assert picture.shape == (224, 224, 3)
    assert (picture[30:194, 30:194] == 128).all()
    assert picture[:30].std() > 20
    pixels = CLIPImageProcessor()(noise_image(300, 300), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[BOS, *[IMAGE] * 256, 40, 41]])
    with torch.no_grad():
        prompted = model(input_ids=ids, pixel_values=pixels).logits
        with without_prompt(model):
            clean = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.isfinite(prompted).all()
    assert not torch.equal(prompted, clean)
    assert model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2).shape == (1, len(ids[0]) + 2)


def test_the_official_arithmetic_is_the_layers(checkpoint, tmp_path):
    """Shrunk by a processor: zero-padded image + prompt, then CLIP's normalisation, as the official code does."""
    from peft_vlm.data.shrink import ShrinkingProcessor
    from peft_vlm.methods.tvp import prompt_layer_of

    config = convert_checkpoint(checkpoint, tmp_path / "prompt", shrink="processor").config
    config.base_architecture = None
    model = get_peft_model(llava_224(), config)
    prompt = tensors(NAME)["perturbation"]
    prompt_layer_of(model).prompts["default"].data.copy_(prompt)
    image = noise_image(300, 300)
    pixels = ShrinkingProcessor(CLIPImageProcessor(), canvas_size=224, border=30)(image, return_tensors="pt")
    small = torch.from_numpy(np.asarray(image.resize((164, 164), 3)).copy()).permute(2, 0, 1).float() / 255
    padded = torch.nn.functional.pad(small, (30, 30, 30, 30))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.image_mean, config.image_std))
    seen = prompt_layer_of(model).prompted(pixels["pixel_values"])[0]
    torch.testing.assert_close(seen, (padded + prompt - mean) / std, rtol=0, atol=3e-6)


def test_other_files_and_shapes_are_refused(checkpoint, tmp_path):
    torch.save({"ctx": torch.zeros(4, 8)}, tmp_path / "coop.pth")
    with pytest.raises(AdapterError, match=r"one tensor 'perturbation' .*got \['ctx'\]"):
        convert_checkpoint(tmp_path / "coop.pth", tmp_path / "out")
    torch.save({"perturbation": torch.zeros(3, 8, 9)}, tmp_path / "oblong.pth")
    with pytest.raises(AdapterError, match=r"\(3, size, size\), got \(3, 8, 9\)"):
        convert_checkpoint(tmp_path / "oblong.pth", tmp_path / "out")
    with pytest.raises(AdapterError, match="zero outside its shape, got .* `border`=20"):
        convert_checkpoint(checkpoint, tmp_path / "out", border=20)
    torch.save({"perturbation": torch.ones(3, 8, 8)}, tmp_path / "full.pth")
    config = convert_checkpoint(tmp_path / "full.pth", tmp_path / "out").config
    assert (config.canvas_size, config.shape, config.border) == (8, "full", 0)
