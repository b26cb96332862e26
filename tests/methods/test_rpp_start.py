"""Other methods' shared prompts start from an RPP adapter where shapes allow; long class lists."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, MaPLeConfig, PromptSRCConfig
from peft_vlm.adapters.config import read_config
from peft_vlm.errors import AdapterError, PeftVLMWarning
from peft_vlm.methods.rpp import start_shared_prompts
from peft_vlm.models.towers import towers_of
from peft_vlm.text import encode_classes
from tests.cases import class_prompts, perturb, pixels, rpp_config
from tests.tiny import tiny_clip


def saved(folder: Path, **settings) -> torch.nn.Module:
    """A perturbed RPP adapter in a folder, and its model."""
    own = {"share_qkv": "all", "slot_residual": "replaced"}
    model = get_peft_model(tiny_clip(), rpp_config(**(own | settings))).eval()
    perturb(model)
    model.save_pretrained(folder)
    return model


def test_coop_starts_as_the_text_tower_of_a_shallow_rpp_adapter(tmp_path: Path):
    source = saved(tmp_path, text_depth=1, vision_depth=0)
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2, context_init=None)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start_shared_prompts(model, tmp_path)
    assert_close(encode_classes(model, class_prompts()), encode_classes(source, class_prompts()), rtol=0, atol=1e-5)


def test_coop_with_the_class_name_elsewhere_is_a_start_only(tmp_path: Path):
    saved(tmp_path, text_depth=1, vision_depth=0)
    config = CoOpConfig(num_text_tokens=2, context_init=None, class_position="middle")
    with pytest.warns(PeftVLMWarning, match="stands at the 'middle' of the context"):
        start_shared_prompts(get_peft_model(tiny_clip(), config), tmp_path)


def test_promptsrc_starts_from_both_towers_and_says_what_is_not_exact(tmp_path: Path):
    source = saved(tmp_path)
    config = PromptSRCConfig(num_text_tokens=2, text_depth=2, num_vision_tokens=2, vision_depth=2, context_init=None)
    model = get_peft_model(tiny_clip(), config).eval()
    with pytest.warns(PeftVLMWarning, match="first vision tokens pass a norm"):
        start_shared_prompts(model, tmp_path)
    assert_close(encode_classes(model, class_prompts()), encode_classes(source, class_prompts()), rtol=0, atol=1e-5)
    deep = [towers_of(m).vision_layers[1] for m in (model, source)]
    assert torch.equal(deep[0].prompts["default"], deep[1].container("shared")["default"])
    vision = towers_of(model).model.vision_model
    entered = vision.pre_layrnorm(vision.embeddings(pixels()))[0, -2:]
    wanted = towers_of(source).vision_layers[0].container("shared")["default"]
    assert torch.nn.functional.cosine_similarity(entered, wanted, dim=-1).min() > 0.3


def test_maple_starts_from_the_text_prompts_and_keeps_its_projections(tmp_path: Path):
    """Its vision tokens have no place of their own; prompts that were put into a projection would be of no use."""
    source = saved(tmp_path)
    model = get_peft_model(tiny_clip(), MaPLeConfig(num_text_tokens=2, depth=2, context_init=None)).eval()
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad and "vision_model" in name}
    with pytest.warns(PeftVLMWarning, match="vision tokens are projected from the text tokens"):
        start_shared_prompts(model, tmp_path)
    assert_close(encode_classes(model, class_prompts()), encode_classes(source, class_prompts()), rtol=0, atol=1e-5)
    assert len(before) == 4
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_a_context_with_attribute_words_is_refused(tmp_path: Path):
    """Three vectors before a word and one after it have the shape of four vectors in a row."""
    saved(tmp_path, text_depth=1, vision_depth=0, num_text_tokens=4)
    config = CoOpConfig(num_text_tokens=1, attribute_ids=[[5]], num_attribute_tokens=[3])
    with pytest.raises(AdapterError, match="without attribute words"):
        start_shared_prompts(get_peft_model(tiny_clip(), config), tmp_path)


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({"share_qkv": "none", "slot_residual": "stream"}, {}, "no single tensor that shared tokens could start from"),
        ({"num_text_tokens": 3}, {}, r"Expected 2 text prompts of shape \[\(2, 32\)\].*got 2 of shape \[\(3, 32\)\]"),
        ({"vision_depth": 1}, {}, "Expected 2 vision prompts.*got 1.*`vision_depth`"),
    ],
)
def test_other_shapes_and_separate_prompts_are_refused(tmp_path: Path, settings: dict, target: dict, message: str):
    saved(tmp_path, **settings)
    own = {"num_text_tokens": 2, "text_depth": 2, "num_vision_tokens": 2, "vision_depth": 2, "context_init": None}
    model = get_peft_model(tiny_clip(), PromptSRCConfig(**(own | target)))
    with pytest.raises(AdapterError, match=message):
        start_shared_prompts(model, tmp_path)


def test_a_long_class_list_stands_beside_the_configuration(tmp_path: Path):
    """22,000 names in the JSON would make a configuration of half a megabyte that nobody can read."""
    names = [f"class {number}" for number in range(2001)]
    rpp_config(class_names=names).save_pretrained(tmp_path / "long")
    raw = json.loads((tmp_path / "long" / "adapter_config.json").read_text())
    assert raw["class_names"] is None
    assert read_config(tmp_path / "long").class_names == names
    assert read_config(tmp_path / "long").class_names == names
    rpp_config(class_names=names[:2000]).save_pretrained(tmp_path / "short")
    assert not (tmp_path / "short" / "class_names.txt").exists()
    assert read_config(tmp_path / "short").class_names == names[:2000]
