"""Prompts that start from words: the base model at first, and able to move in every layer."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import CLIPModel

from peft_vlm.adapters.qkv_prompt import ProjectionPrompts
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.methods.rpp.model import WORD_STD, word_states
from peft_vlm.models.towers import PROJECTIONS, towers_of
from peft_vlm.text import reserve_slots
from tests.cases import WORD_A, class_prompts, pixels, rpp_config
from tests.tiny import tiny_clip

OWN = {"num_text_tokens": 1, "context_init_ids": WORD_A, "num_vision_tokens": 0}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = reserve_slots(model, class_prompts()).input_ids
    return model(pixel_values=pixels(), input_ids=ids).logits_per_image


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"slot_residual": "replaced", "text_depth": 1}, {"share_qkv": "all"}])
def test_an_untrained_text_tower_is_the_base_model_with_the_initial_words(settings: dict):
    model = get_peft_model(tiny_clip(), rpp_config(**(OWN | settings))).eval()
    base = tiny_clip()(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
    assert_close(logits(model), base, rtol=0, atol=5e-3)  # the norm's epsilon, at the small size of a start


def large_stream_clip() -> CLIPModel:
    """A CLIP whose upper text layers read states a hundred times the size of embedded words, as trained ones do."""
    model = tiny_clip()
    with torch.no_grad():
        layer = towers_of(model).text_layers[0]
        layer.mlp.fc2.bias.copy_(torch.randn(32, generator=torch.Generator().manual_seed(1)) * 15)
    return model


@pytest.mark.parametrize("settings", [{}, {"share_qkv": "all"}, {"slot_residual": "replaced", "dead_prompts": "omit"}])
def test_prompts_that_start_from_words_move_in_every_layer(settings: dict):
    """Behind a norm a large prompt hardly turns: those of upper layers would stay words for good, gradient or not."""
    assert word_states(large_stream_clip(), tuple(WORD_A), depth=2)[1].std() > 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftVLMWarning)
        model = get_peft_model(large_stream_clip(), rpp_config(text_depth=2, **(OWN | settings)))
    base = large_stream_clip()(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
    assert_close(logits(model), base, rtol=0, atol=0.02)  # of logits near 10
    layers = [module for module in model.modules() if isinstance(module, ProjectionPrompts)]
    parts = (*PROJECTIONS, "shared")
    places = [(layer, part) for layer in layers for part in parts if "default" in layer.container(part)]
    assert len(places) == {"all": 2}.get(settings.get("share_qkv"), 5 if settings else 6)
    F.cross_entropy(logits(model), torch.arange(4)).backward()
    for layer, part in places:
        prompt = layer.container(part)["default"]
        if layer.carries(part, "default"):
            continue  # its size counts, so it stays that of the words
        assert prompt.std() < 1.01 * WORD_STD
        turned = prompt.detach() - 0.1 * prompt.grad
        before, after = (layer.base_layer.layer_norm1(p).detach() for p in (prompt, turned))
        moved = float((after - before).norm() / before.norm())
        assert moved > (1e-6 if part == "query" else 1e-3), (layer.number, part, moved)
