"""Prompts in one packed row give the features and gradients of prompts one by one."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from peft_vlm import CoOpConfig, PromptSRCConfig, RPPConfig, SkipTuningConfig
from peft_vlm.models.packed_texts import LONGEST_MASKED, PackedTexts, passes
from peft_vlm.models.towers import Towers, towers_of
from tests.tiny import tiny_clip, tiny_siglip

START, END = 512, 513


def prompts(*names: list[int], slots: int = 0, after: int = 0) -> Tensor:
    """Start token, slots before and after the name, the name, a full stop, end of text, padding."""
    rows = [[START, *[START] * slots, *name, *[START] * after, 7, END] for name in names]
    longest = max(map(len, rows))
    return torch.tensor([row + [END] * (longest - len(row)) for row in rows])


NAMES = ([3], [9, 4, 11], [3, 5], [8, 8, 8, 2, 1], [9, 4, 12])
PLAIN = prompts(*NAMES)


def coop(**settings: Any) -> CoOpConfig:
    return CoOpConfig(context_init=None, num_text_tokens=4, **settings)


def promptsrc(**settings: Any) -> PromptSRCConfig:
    return PromptSRCConfig(
        **({"context_init": None, "num_text_tokens": 2, "text_depth": 3, "vision_depth": 1} | settings)
    )


def rpp(**settings: Any) -> RPPConfig:
    return RPPConfig(**({"context_init": None, "num_text_tokens": 2, "text_depth": 2, "vision_depth": 1} | settings))


TEXT_LAYERS = r".*text_model.*\.(q_proj|v_proj|fc1)"
CASES = {
    "no adapter": (None, PLAIN),
    "coop, end": (coop(), prompts(*NAMES, slots=4)),
    "coop, middle": (coop(class_position="middle"), prompts(*NAMES, slots=2, after=2)),
    "coop, front": (coop(class_position="front"), prompts(*NAMES, after=4)),
    "deep prompts": (promptsrc(), prompts(*NAMES, slots=2)),
    "q, k, v prompts": (rpp(), prompts(*NAMES, slots=2)),
    "q, k, v prompts, replaced": (rpp(slot_residual="replaced", share_qkv="all"), prompts(*NAMES, slots=2)),
    "q, k, v prompts, shared": (rpp(share_qkv="all"), prompts(*NAMES, slots=2)),
    "q, k, v prompts in every layer": (rpp(text_depth=3, share_qkv="all"), prompts(*NAMES, slots=2)),
    "tuned layers": (SkipTuningConfig(start_layer=1), PLAIN),
    "lora": (LoraConfig(target_modules=TEXT_LAYERS, init_lora_weights=False), PLAIN),
    "dora": (LoraConfig(target_modules=TEXT_LAYERS, init_lora_weights=False, use_dora=True), PLAIN),
    "one prompt": (coop(), prompts(NAMES[0], slots=4)),
    "equal prompts": (coop(), prompts(NAMES[1], NAMES[1], NAMES[0], slots=4)),
    "equal lengths": (coop(), prompts(NAMES[1], NAMES[4], slots=4)),
}


def adapted(config: Any) -> nn.Module:
    """A tiny CLIP in training mode with an adapter that does something."""
    model: nn.Module = tiny_clip()
    if config is not None:
        torch.manual_seed(0)
        model = get_peft_model(model, copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    else:
        model.requires_grad_(True)
    return model.train()


def plain(towers: Towers, ids: Tensor, start: int = 0) -> Tensor:
    """Whole, padded prompts through every layer."""
    return towers.pool_text(towers.run_text(towers.embed_text(ids)), ids)


def packed(towers: Towers, ids: Tensor, start: int = 0) -> Tensor:
    """The path that class features and objectives take; layers before `start` run on whole prompts."""
    before = passes["packed"]
    features = towers.finish_text(towers.run_text(towers.embed_text(ids), 0, start), ids, start)
    assert passes["packed"] == before + 1, f"took another path: {passes}"
    return features


def gradients(model: nn.Module, features: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss in which every number of the features has a weight of its own."""
    model.zero_grad()
    features = nn.functional.normalize(features, dim=-1)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("attention", ["in parts", "masked"])
def test_packed_prompts_give_the_same_features_and_gradients(
    case: str, start: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another result would train another adapter than the model that is used with it."""
    monkeypatch.setitem(LONGEST_MASKED, "cpu", 2048 if attention == "masked" else 0)  # as on a GPU
    config, ids = CASES[case]
    model = adapted(config)
    towers = towers_of(model)
    expected, features = plain(towers, ids), packed(towers, ids, start)
    assert_close(features, expected, rtol=0.0, atol=1e-5)
    wanted, got = gradients(model, expected), gradients(model, features)
    assert wanted.keys() == got.keys()
    assert len(wanted) >= 1
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-2)  # keys' biases shift all scores alike: zero but for rounding
        assert_close(got[name], gradient, rtol=0.0, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")


def test_what_prompts_begin_with_runs_once() -> None:
    """The linear layers see the shared tokens once, and no padding."""
    model = adapted(coop())
    seen = []
    linear = towers_of(model).text_layers[0].mlp.fc1
    run = linear.forward
    linear.forward = lambda tokens: seen.append(tokens.shape) or run(tokens)
    packed(towers_of(model), prompts(*NAMES, slots=4))
    shared, own = 1 + 4, sum(len(name) + 2 for name in NAMES)
    assert seen == [(1, shared + own, 32)]


def test_the_layout_by_hand() -> None:
    """Two prompts `a b e` and `a c d e` share one token; their own ones follow each other."""
    texts = PackedTexts.of(torch.tensor([[5, 1, 9, 9], [5, 2, 3, 9]]), torch.tensor([2, 3]))
    assert texts.num_shared == 1
    assert (texts.rows.tolist(), texts.columns.tolist()) == ([0, 0, 1, 1, 1], [1, 2, 1, 2, 3])
    assert texts.own.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert texts.real.tolist() == [[True, True, False], [True, True, True]]
    assert texts.pooled.tolist() == [1, 4]
    hidden = torch.arange(8.0).view(2, 4, 1)
    assert texts.pack(hidden).flatten().tolist() == [0, 1, 2, 5, 6, 7]
    own = texts.pack(hidden)[0, 1:]
    assert torch.equal(texts.untable(texts.table(own)), own)


def test_a_prompt_never_shares_its_pooled_token() -> None:
    """Equal prompts are equal up to their end, which each of them needs for itself."""
    texts = PackedTexts.of(torch.tensor([[5, 1, 9, 9], [5, 1, 9, 9]]), torch.tensor([2, 2]))
    assert (texts.num_shared, texts.pooled.tolist()) == (2, [0, 1])


def test_recomputed_layers_give_the_same_gradients() -> None:
    """Gradient checkpointing reaches packed layers too."""
    ids = prompts(*NAMES, slots=2)
    results = []
    for checkpointing in (False, True):
        model = adapted(promptsrc())
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        calls = []
        linear = towers_of(model).text_layers[-1].mlp.fc1
        run = linear.forward
        linear.forward = lambda tokens, run=run, calls=calls: calls.append(1) or run(tokens)
        results.append(gradients(model, packed(towers_of(model), ids)))
        assert len(calls) == 1 + checkpointing
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_half_precision_is_as_near_as_that_of_whole_prompts() -> None:
    """Under autocast both paths round to bfloat16; neither is nearer to float32 than the other."""
    model, ids = adapted(promptsrc()), prompts(*NAMES, slots=2)
    towers = towers_of(model)
    exact = plain(towers, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        off = [float((run(towers, ids).detach().float() - exact.detach()).abs().max()) for run in (plain, packed)]
    assert 0 < off[1] < 2 * off[0] + 1e-3


def took(model: nn.Module, ids: Tensor) -> str:
    """The path of one pass."""
    before = passes.copy()
    towers = towers_of(model)
    features = towers.finish_text(towers.embed_text(ids), ids, 0)
    assert_close(features, plain(towers, ids), rtol=0.0, atol=1e-5)
    (path,) = passes - before
    return path


def test_layers_that_must_run_as_they_are_do_so() -> None:
    """A hook must see whole prompts; dropout is drawn for each prompt, not once for the tokens they share."""
    model = tiny_clip().eval()
    assert took(model, PLAIN) == "packed"
    handle = towers_of(model).text_layers[1].self_attn.register_forward_hook(lambda *call: None)
    assert took(model, PLAIN) == "plain: a hook watches a layer"
    handle.remove()
    assert took(model, PLAIN) == "packed"
    lora = get_peft_model(model, LoraConfig(target_modules=TEXT_LAYERS, lora_dropout=0.5))
    assert took(lora.eval(), PLAIN) == "packed"
    before = passes.copy()
    towers = towers_of(lora.train())
    towers.finish_text(towers.embed_text(PLAIN), PLAIN, 0)
    assert list(passes - before) == ["plain: a layer has dropout"]
    model = tiny_clip()
    for layer in towers_of(model).text_layers:
        layer.self_attn.dropout = 0.5
    before, towers = passes.copy(), towers_of(model.train())
    towers.finish_text(towers.embed_text(PLAIN), PLAIN, 0)
    assert list(passes - before) == ["plain: attention has dropout"]


def test_prompts_that_differ_where_a_layer_is_prompted_run_one_by_one() -> None:
    """Deep prompts replace the same positions in all prompts; with other tokens there they would not be shared."""
    model = get_peft_model(tiny_clip(), promptsrc())
    towers, hidden = towers_of(model), torch.randn(2, 5, 32)
    ids = torch.tensor([[START, 3, 4, 7, END], [START, 5, 4, 7, END]])
    before = passes.copy()
    features = towers.finish_text(hidden, ids, 0)
    assert list(passes - before) == ["plain: prompts differ where a layer is prompted"]
    assert_close(features, towers.pool_text(towers.run_text(hidden), ids))


def test_bidirectional_texts_are_not_packed() -> None:
    """SigLIP's tokens see what follows them, so nothing is the same in two prompts."""
    model = tiny_siglip()
    towers, ids = towers_of(model), torch.tensor([[3, 4, 1, 1], [3, 5, 6, 1]])
    before = passes.copy()
    towers.finish_text(towers.embed_text(ids), ids, 0)
    assert passes == before
