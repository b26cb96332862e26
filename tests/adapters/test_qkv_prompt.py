"""Separate prompts for queries, keys and values: by hand, by the equations, against deep prompts; what is dead."""

import math
from dataclasses import dataclass

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from peft_vlm import PromptSRCConfig, RPPConfig
from peft_vlm.adapters.qkv_prompt import ProjectionPrompts, dead_queries
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.models.towers import PROJECTIONS, towers_of
from peft_vlm.text import reserve_slots
from tests.cases import class_prompts, perturb, pixels, rpp_config
from tests.tiny import tiny_clip


@dataclass
class Settings:
    """What a layer reads of a configuration."""

    num_text_tokens: int = 2
    num_vision_tokens: int = 1
    share_qkv: str = "none"
    slot_residual: str = "stream"

    def dead_layers(self, tower: str) -> dict:
        """No prompt is left out."""
        return {}


class EveryQuery(RPPConfig):
    """A configuration that keeps dead query prompts, to show that they are dead."""

    def dead_layers(self, tower: str) -> dict:
        """None."""
        return {}


def one_layer(width: int, *, tower: str = "vision", heads: int = 1, **settings) -> ProjectionPrompts:
    config = CLIPVisionConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=width)
    config._attn_implementation = "sdpa"
    layer = ProjectionPrompts(CLIPEncoderLayer(config).eval(), prefix="rpp_", tower=tower, number=0)
    layer.add_adapter("default", Settings(**settings))
    layer.set_adapter(["default"])
    return layer


@torch.no_grad()
@pytest.mark.parametrize(("residual", "slot"), [("stream", 0.0), ("replaced", 4.0)])
def test_one_layer_by_hand(residual: str, slot: float):
    """Width 2, one head, identity projections, no MLP: LN maps (a, b) with a > b to (1, -1), else to (-1, 1).

    Token (1, -1) and an empty slot; P_Q = (4, -4), P_K = (0, 3), P_V = (-2, 7). Every query is (1, -1), the keys are
    (1, -1) and (-1, 1), so the scores are sqrt 2 and -sqrt 2, the weights w and 1 - w with 2 w - 1 = tanh(sqrt 2), and
    both outputs w (1, -1) + (1 - w) (-1, 1) = tanh(sqrt 2) (1, -1).
    """
    layer = one_layer(2, slot_residual=residual)
    for name, parameter in layer.base_layer.named_parameters():
        if "layer_norm" not in name:
            parameter.copy_(torch.eye(2) if name.endswith("weight") and "self_attn" in name else 0 * parameter)
    for part, values in {"query": (4.0, -4.0), "key": (0.0, 3.0), "value": (-2.0, 7.0)}.items():
        layer.container(part)["default"].copy_(torch.tensor([values]))
    hidden = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    out = layer(hidden, attention_mask=None)
    change = math.tanh(math.sqrt(2.0))
    expected = [[1 + change, -1 - change], [slot + change, -slot - change]]
    assert_close(out, torch.tensor([expected]), rtol=0, atol=2e-5)  # LayerNorm's epsilon of 1e-5


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("residual", ["stream", "replaced"])
def test_a_layer_computes_the_published_equations(tower: str, residual: str):
    """X_Q = LN(Rep(X, P_Q)) and so on, each through the frozen projection, then attention over all tokens."""
    torch.manual_seed(0)
    layer = one_layer(8, tower=tower, heads=2, num_vision_tokens=2, slot_residual=residual)
    base, hidden = layer.base_layer, torch.randn(3, 6, 8)
    slots = slice(1, 3) if tower == "text" else slice(4, 6)
    mask = torch.full((6, 6), float("-inf")).triu(1) if tower == "text" else torch.zeros(6, 6)

    def replaced(prompt: torch.Tensor) -> torch.Tensor:
        out = hidden.clone()
        out[:, slots] = prompt
        return out

    heads = {}
    for part, leaf in PROJECTIONS.items():
        projected = getattr(base.self_attn, leaf).projection(base.layer_norm1(replaced(layer.prompt(part))))
        heads[part] = projected.view(3, 6, 2, 4).transpose(1, 2)
    scores = heads["query"] @ heads["key"].transpose(-1, -2) / 2.0 + mask
    attended = (scores.softmax(dim=-1) @ heads["value"]).transpose(1, 2).reshape(3, 6, 8)
    stream = replaced(layer.prompt("query")) if residual == "replaced" else hidden
    expected = stream + base.self_attn.out_proj(attended)
    expected = expected + base.mlp(base.layer_norm2(expected))
    actual = layer(hidden, attention_mask=mask.expand(3, 1, 6, 6))
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of the tiny CLIP's own forward."""
    ids = reserve_slots(model, class_prompts()).input_ids
    return model(pixel_values=pixels(), input_ids=ids).logits_per_image


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_tied_prompts_are_a_plain_deep_prompt_model(shared: bool):
    """With the residual "replaced"; the first prompts enter behind the positions and behind the first vision norm."""
    deep = get_peft_model(
        tiny_clip(),
        PromptSRCConfig(num_text_tokens=2, text_depth=2, num_vision_tokens=2, vision_depth=2, context_init=None),
    ).eval()
    perturb(deep)
    settings = {"slot_residual": "replaced", "share_qkv": "all"} if shared else {"slot_residual": "replaced"}
    config = rpp_config(**settings) if shared else EveryQuery(**(rpp_config().to_dict() | settings))
    model = get_peft_model(tiny_clip(), config).eval()
    source, target = towers_of(deep), towers_of(model)
    text, vision = source.model.text_model, source.model.vision_model
    first = {
        "text": source.token_embedding.prompts["default"] + text.embeddings.position_embedding.weight[1:3],
        "vision": vision.pre_layrnorm(vision.embeddings.prompts["default"]),
    }
    for tower, prompt in first.items():
        layers = getattr(target, f"{tower}_layers")
        for number, value in enumerate((prompt, getattr(source, f"{tower}_layers")[1].prompts["default"])):
            for part in ("shared",) if shared else PROJECTIONS:
                layers[number].container(part)["default"].copy_(value)
    assert_close(logits(model), logits(deep), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", ["stream", "replaced"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_query_prompts_are_dead_where_the_rule_says_so_and_alive_elsewhere(residual: str, depth: int):
    """Gradients of three layers, all query prompts kept; keys and values always act."""
    own = {"text_depth": depth, "vision_depth": depth, "slot_residual": residual}
    model = get_peft_model(tiny_clip(), EveryQuery(**(rpp_config().to_dict() | own))).eval()
    perturb(model)
    logits(model)[:, 0].sum().backward()
    dead = dead_queries(depth, 3, slot_residual=residual)
    for tower in ("text", "vision"):
        layers = getattr(towers_of(model), f"{tower}_layers")
        for number in range(depth):
            grads = {part: layers[number].container(part)["default"].grad for part in PROJECTIONS}
            largest = {part: 0.0 if grad is None else float(grad.abs().max()) for part, grad in grads.items()}
            assert largest["key"] > 1e-6
            assert largest["value"] > 1e-6
            if number in dead:
                assert largest["query"] == 0.0, (tower, number)
            else:
                assert largest["query"] > 1e-6, (tower, number)


def test_where_query_prompts_are_dead():
    assert sorted(dead_queries(9, 12, slot_residual="stream")) == []
    assert sorted(dead_queries(9, 12, slot_residual="replaced")) == list(range(8))
    assert sorted(dead_queries(12, 12, slot_residual="stream")) == list(range(12))
    assert sorted(dead_queries(1, 12, slot_residual="replaced")) == []


def test_dead_prompts_are_left_out_with_a_warning_on_request():
    """What is left all receives a gradient."""
    config = rpp_config(text_depth=3, slot_residual="replaced", dead_prompts="omit")
    with pytest.warns(PeftVLMWarning, match=r"text layers \[0, 1, 2\]: no unprompted.*vision layers \[0\]: the next"):
        model = get_peft_model(tiny_clip(), config).eval()
    perturb(model)
    logits(model)[:, 0].sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 + 2 + 3
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in trained.values())


@torch.no_grad()
def test_the_end_of_text_stays_where_it_is():
    """CLIP pools there: a shift by one would read another token, silently."""
    model = get_peft_model(tiny_clip(), rpp_config()).eval()
    prompts = reserve_slots(model, class_prompts())
    plain, reserved = (towers_of(model).pooled_positions(p.input_ids) for p in (class_prompts(), prompts))
    assert torch.equal(reserved, plain + 2)
    embedded = towers_of(model).embed_text(prompts.input_ids)
    assert embedded.shape[1] == prompts.input_ids.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"slot_residual": "replaced", "vision_depth": 1, "text_depth": 1}])
def test_folded_prompts_give_the_same_bits_until_training_starts(settings: dict):
    """The projected prompts are computed in the same way, once; training must not go on with old constants."""
    model = get_peft_model(tiny_clip(), rpp_config(**settings)).eval()
    perturb(model)
    expected = logits(model)
    model.base_model.fold()
    layers = [module for module in model.modules() if isinstance(module, ProjectionPrompts)]
    prompt = layers[0].container("key")["default"]
    saved = prompt.clone()
    prompt.zero_()
    assert torch.equal(logits(model), expected)
    prompt.copy_(saved)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # projections have another type there, folded rows have not
        folded = logits(model)
        model.base_model.unfold()
        assert torch.equal(folded, logits(model))
    model.base_model.fold()
    model.train()
    prompt.zero_()
    assert not torch.equal(logits(model.eval()), expected)


@torch.no_grad()
@pytest.mark.parametrize("way", ["added", "loaded"])
def test_another_adapter_of_the_same_name_is_not_that_which_was_folded(way: str):
    """A server that replaces an adapter would go on answering with the old one."""
    model = get_peft_model(tiny_clip(), rpp_config()).eval()
    perturb(model)
    model.base_model.fold()
    old = logits(model)
    if way == "added":
        model.add_adapter("other", rpp_config())
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", rpp_config())
        model.set_adapter("default")
    else:
        state = get_peft_model_state_dict(model)
        set_peft_model_state_dict(model, {key: tensor + 0.1 for key, tensor in state.items()})
    new = logits(model)
    assert not torch.equal(new, old)
    model.base_model.unfold()
    assert torch.equal(logits(model), new)


@torch.no_grad()
def test_attention_maps_and_hidden_states_are_still_there():
    model = get_peft_model(tiny_clip(), rpp_config()).eval().get_base_model()
    model.set_attn_implementation("eager")
    image = model.vision_model(pixel_values=pixels(), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in image.hidden_states] == [(4, 7, 32)] * 4
    assert [tuple(a.shape) for a in image.attentions] == [(4, 4, 7, 7)] * 3


@torch.no_grad()
def test_adapters_of_different_rules_share_a_layer():
    model = get_peft_model(tiny_clip(), rpp_config()).eval()
    perturb(model)
    first = logits(model)
    model.add_adapter("second", rpp_config(slot_residual="replaced", share_qkv="all", text_depth=3, vision_depth=1))
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    leaf = towers_of(model).text_layers[0].self_attn.q_proj
    assert leaf.weight is leaf.projection.weight
    with pytest.raises(AttributeError):
        _ = leaf.no_such_attribute


def test_random_prompts_have_the_official_spread():
    model = get_peft_model(tiny_clip(), rpp_config(num_text_tokens=30, num_vision_tokens=0))
    values = towers_of(model).text_layers[0].container("key")["default"]
    assert float(values.detach().std()) == pytest.approx(0.02, rel=0.1)
