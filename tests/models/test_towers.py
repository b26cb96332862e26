"""The towers in pieces give what the model's own forward gives."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.models.towers import image_features, side_of, split_at_prompts, text_features, towers_of
from tests.tiny import tiny_clip, tiny_siglip

PROMPTS = torch.tensor([[512, 3, 9, 513, 513, 513], [512, 4, 5, 6, 7, 513], [512, 1, 513, 8, 2, 513]])


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def in_pieces(model, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    towers = towers_of(model)
    image = towers.finish_image(towers.run_vision(towers.embed_image(pixels()), 0, start), start)
    text = towers.finish_text(towers.run_text(towers.embed_text(PROMPTS), 0, start), PROMPTS, start)
    return image, text


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("family", [tiny_clip, tiny_siglip])
def test_finishing_a_tower_from_any_layer_equals_the_whole(family, start):
    model = family(layers=2)
    image, text = in_pieces(model, start)
    assert_close(image, image_features(model, pixels()), rtol=1e-5, atol=1e-5)
    assert_close(text, text_features(model, PROMPTS), rtol=1e-5, atol=1e-5)


def test_eos_by_highest_id_pools_the_same_token():
    """Old checkpoints say `eos_token_id=2`, for which Hugging Face takes the highest id."""
    model = tiny_clip(eos_token_id=2)
    assert_close(in_pieces(model, 0)[1], text_features(model, PROMPTS), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_short_last_layer_are_those_of_the_whole_layer():
    def gradients(run) -> dict[str, torch.Tensor]:
        model = tiny_clip()
        image, text = run(model)
        (image.square().sum() + text.square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(lambda model: (image_features(model, pixels()), text_features(model, PROMPTS)))
    short = gradients(lambda model: in_pieces(model, 0))
    assert whole.keys() == short.keys()
    for name, gradient in whole.items():
        if name.endswith("k_proj.bias"):  # softmax ignores a shift of all keys: zero but for rounding
            assert max(float(gradient.abs().max()), float(short[name].abs().max())) < 1e-4
            continue
        assert_close(short[name], gradient, rtol=0.0, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_a_hooked_last_layer_runs_whole():
    """Someone who watches the layer's output wants all of it."""
    model = tiny_clip()
    shapes = []
    model.vision_model.encoder.layers[-1].register_forward_hook(lambda *call: shapes.append(call[2].shape))
    in_pieces(model, 0)
    assert shapes == [torch.Size([3, 5, 32])]


def test_a_hooked_attention_runs_whole():
    """The short form does not call the attention block, so that a watcher would silently see nothing."""
    model = tiny_clip()
    calls = []
    attention = model.text_model.encoder.layers[-1].self_attn
    attention.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    in_pieces(model, 0)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "text"),
        ("base_model.model.text_model.embeddings.token_embedding.coop_prompt.default", "text"),
        ("text_projection.weight", "text"),
        ("an_added_text_module.weight", "text"),
        ("base_model.model.vision_model.embeddings.promptsrc_prompt.default", "vision"),
        ("visual_projection.promptkd_linear1.default.weight", "vision"),
        ("base_model.model.logit_scale", None),
        ("logit_bias", None),
    ],
)
def test_every_parameter_has_one_side(name, side):
    """A parameter on the wrong side would be trained with the other tower's learning rate."""
    assert side_of(name) == side


@pytest.mark.parametrize(("given", "expected"), [((0, 2), (512, 513)), ((5, 6), (5, 6))])
def test_token_ids_of_old_configs_are_the_last_two_of_the_vocabulary(given, expected):
    """OpenAI's configs name tokens 0 and 2, which are punctuation in their vocabulary."""
    model = tiny_clip()
    text = model.config.text_config
    text.vocab_size, text.bos_token_id, text.eos_token_id = 514, *given
    towers = towers_of(model)
    assert (towers.start_token_id, towers.end_token_id) == expected


@pytest.mark.parametrize(("side", "first"), [("text", 1), ("vision", 3)])
def test_prompts_stand_after_the_start_token_or_last(side, first):
    """All layers must agree on the places, or a layer would overwrite a word or a patch."""
    before, after = split_at_prompts(torch.arange(5.0).view(1, 5, 1), 2, side=side)
    assert before.flatten().tolist() == list(range(first))
    assert after.flatten().tolist() == list(range(first + 2, 5))


def test_the_last_layer_computes_one_token_only():
    model = tiny_clip()
    tokens = []
    layers = (model.vision_model.encoder.layers, model.text_model.encoder.layers)
    with torch.no_grad():
        for tower in layers:  # a linear inside the layer sees how many tokens come through
            linear = tower[-1].mlp.fc1
            original = linear.forward
            linear.forward = lambda x, run=original: tokens.append(x.shape[:-1].numel()) or run(x)
        in_pieces(model, 0)
    assert tokens == [len(pixels()), len(PROMPTS)]


def test_logits_are_exact_under_autocast():
    """Half-precision cosines are off by a tenth of a logit at CLIP's scale."""
    model = tiny_clip()
    image, text = in_pieces(model, 0)
    expected = towers_of(model).similarity_logits(image, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = towers_of(model).similarity_logits(image, text)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
