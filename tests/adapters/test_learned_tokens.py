"""Learned tokens in CLIP's towers: where they enter, what they replace, what is refused."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, PromptSRCConfig
from peft_vlm.adapters.layer import DelegatingLayer
from peft_vlm.adapters.learned_tokens import DeepTokens, TextContext, VisionTokens
from peft_vlm.adapters.qkv_prompt import SlotProjection
from peft_vlm.errors import AdapterError, UnsupportedModelError
from peft_vlm.models.towers import towers_of
from peft_vlm.text import reserve_slots
from tests.cases import CASES, base_model, class_prompts, images, pixels
from tests.tiny import tiny_clip, tiny_siglip, tiny_tokenizer

WORDS = tiny_tokenizer()("ab", add_special_tokens=False)["input_ids"]


def prompted(**settings) -> torch.nn.Module:
    own = {"num_text_tokens": 2, "text_depth": 2, "num_vision_tokens": 3, "vision_depth": 2, "context_init": None}
    return get_peft_model(tiny_clip(), PromptSRCConfig(**(own | settings))).eval()


def input_of(module: torch.nn.Module, run) -> torch.Tensor:
    """What enters a module while something runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run()
    handle.remove()
    (value,) = seen
    return value


def test_text_context_replaces_the_slots_before_positions_are_added():
    model = prompted()
    base = model.get_base_model()
    embeddings = base.text_model.embeddings
    ids = reserve_slots(model, class_prompts()).input_ids
    context = embeddings.token_embedding.promptsrc_prompt["default"]
    with torch.no_grad():
        hidden = embeddings(input_ids=ids)
        positions = embeddings.position_embedding.weight[: ids.shape[1]]
        words = embeddings.token_embedding.base_layer(ids)
    for row in range(len(ids)):
        assert_close(hidden[row, 1:3], context.detach() + positions[1:3])
        assert_close(hidden[row, 3:], words[row, 3:] + positions[3:])
        assert_close(hidden[row, 0], words[row, 0] + positions[0])


def test_vision_tokens_stand_behind_the_patches_without_positions():
    model = prompted()
    vision = model.get_base_model().vision_model
    with torch.no_grad():
        with_tokens = vision.embeddings(pixels())
        without = vision.embeddings.base_layer(pixels())
    assert with_tokens.shape == (4, 5 + 3, 32)
    assert torch.equal(with_tokens[:, :5], without)
    assert torch.equal(with_tokens[:, 5:], vision.embeddings.promptsrc_prompt["default"].expand(4, -1, -1))


def test_deep_tokens_replace_the_learned_positions_and_nothing_else():
    model = prompted()
    base = model.get_base_model()
    ids = reserve_slots(model, class_prompts()).input_ids
    inputs = {"pixel_values": pixels(), "input_ids": ids}
    for tower, places in (("text", slice(1, 3)), ("vision", slice(5, 8))):
        layer = base.get_submodule(f"{tower}_model.encoder.layers.1")
        assert isinstance(layer, DeepTokens)
        above = input_of(layer, lambda: model(**inputs))
        inside = input_of(layer.base_layer, lambda: model(**inputs))
        expected = above.clone()
        expected[:, places] = layer.promptsrc_prompt["default"].detach()
        assert torch.equal(inside, expected)
        assert not torch.equal(inside, above)


def test_behind_the_last_prompted_layer_the_outputs_flow_on():
    """Depth 2 of 3 layers: layer 2 is not wrapped."""
    base = prompted().get_base_model()
    for tower in ("text", "vision"):
        layers = base.get_submodule(f"{tower}_model.encoder.layers")
        assert [isinstance(layer, DeepTokens) for layer in layers] == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, {TextContext, VisionTokens, DeepTokens}),
        ({"text_depth": 1, "vision_depth": 1}, {TextContext, VisionTokens}),
        ({"text_depth": 0}, {VisionTokens, DeepTokens}),
        ({"num_text_tokens": 0}, {VisionTokens, DeepTokens}),
        ({"num_vision_tokens": 0}, {TextContext, DeepTokens}),
        ({"vision_depth": 0, "text_depth": 1}, {TextContext}),
    ],
)
def test_a_tower_without_tokens_or_depth_has_none(settings, kinds):
    """IVLP, VPT and CoOp are settings of the same layers."""
    model = prompted(**settings)
    found = {type(module) for module in model.modules() if isinstance(module, TextContext | VisionTokens | DeepTokens)}
    assert found == kinds
    expected = {"text": TextContext in kinds, "vision": VisionTokens in kinds}
    assert towers_of(model).trained_sides() == {side for side, trained in expected.items() if trained}


def test_random_prompts_have_the_official_spread():
    model = get_peft_model(
        tiny_clip(), PromptSRCConfig(num_text_tokens=30, text_depth=1, vision_depth=0, context_init=None)
    )
    values = model.get_base_model().text_model.embeddings.token_embedding.promptsrc_prompt["default"]
    assert values.shape == (30, 32)
    assert float(values.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_context_from_words_starts_at_their_embeddings_and_is_a_copy():
    model = get_peft_model(tiny_clip(), CoOpConfig(context_init_ids=WORDS))
    layer = model.get_base_model().text_model.embeddings.token_embedding
    context = layer.coop_prompt["default"]
    assert torch.equal(context, layer.weight[WORDS])
    with torch.no_grad():
        context.add_(1.0)
    assert not torch.equal(context, layer.base_layer.weight[WORDS])


def test_words_are_read_by_the_tokenizer_of_the_base_model(tmp_path):
    """Their ids then stand in the adapter, which needs no tokenizer to load."""
    from transformers import CLIPModel

    tiny_clip().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = get_peft_model(CLIPModel.from_pretrained(tmp_path), CoOpConfig(context_init="ab"))
    assert model.active_peft_config.context_init_ids == WORDS
    assert model.active_peft_config.num_text_tokens == 2
    assert model.active_peft_config.placeholder_id == 512


def test_legacy_configs_get_the_start_token_of_their_tokenizer():
    """OpenAI's configs say `bos_token_id=0, eos_token_id=2`; their tokenizer's start token is the last but one."""
    base = tiny_clip(eos_token_id=2)
    base.config.text_config.bos_token_id = 0
    model = get_peft_model(base, CoOpConfig(num_text_tokens=2, context_init=None))
    assert model.active_peft_config.placeholder_id == 512
    model(pixel_values=torch.zeros(1, 3, 16, 16), input_ids=torch.tensor([[512, 512, 512, 5, 513, 0, 0]]))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompts_with_another_number_of_slots_are_refused(count):
    """A silent overwrite of the class name is the classic bug of context learning."""
    model = prompted()
    ids = torch.tensor([[512, *[512] * count, 5, 6, 513]])
    with pytest.raises(AdapterError, match=rf"Expected 2 reserved context slots.*got \[{count}\].*a cat"):
        model.get_text_features(input_ids=ids)


def test_the_layers_pass_unknown_attributes_on():
    """transformers reads `weight` of the embedding and settings of a layer."""
    base = prompted().get_base_model()
    embedding = base.text_model.embeddings.token_embedding
    assert embedding.weight is embedding.base_layer.weight
    assert base.text_model.encoder.layers[1].self_attn is base.text_model.encoder.layers[1].base_layer.self_attn
    with pytest.raises(AttributeError):
        _ = embedding.no_such_attribute


def test_an_adapter_leaves_its_slots_behind_with_its_tensors():
    model = prompted()
    model.add_adapter("second", PromptSRCConfig(num_text_tokens=3, text_depth=1, vision_depth=0, context_init=None))
    embedding = model.get_base_model().text_model.embeddings.token_embedding
    assert sorted(embedding.context_slots) == ["default", "second"]
    model.delete_adapter("second")
    assert sorted(embedding.context_slots) == ["default"]


def test_attention_maps_and_hidden_states_are_still_there():
    """transformers records them by the class of the layers, which the wrappers must not hide."""
    model = prompted()
    ids = reserve_slots(model, class_prompts()).input_ids
    with torch.no_grad():
        output = model.get_base_model().text_model(input_ids=ids, output_hidden_states=True)
        image = model.get_base_model().vision_model(pixel_values=pixels(), output_hidden_states=True)
    assert len(output.hidden_states) == len(image.hidden_states) == 4
    assert {tuple(h.shape) for h in image.hidden_states} == {(4, 8, 32)}


@pytest.mark.parametrize("config", [CoOpConfig(), PromptSRCConfig(context_init=None, text_depth=1, vision_depth=1)])
def test_siglip_is_refused_with_advice(config):
    """Family table: it has no start token to count from and pools by attention."""
    with pytest.raises(UnsupportedModelError, match="Expected a `CLIPModel`, got `SiglipModel`.*Skip Tuning works"):
        get_peft_model(tiny_siglip(), config)


def test_other_architectures_are_refused_by_name():
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(UnsupportedModelError, match="got `BertModel`"):
        get_peft_model(bert, PromptSRCConfig(context_init=None))


@pytest.mark.parametrize("method", ["coop", "promptsrc", "promptkd", "rpp"])
def test_a_step_asks_wrapped_layers_for_nothing_that_is_their_own(method: str, monkeypatch) -> None:
    """Each submodule of a wrapper would be looked up by two Python calls, dozens of times a step."""
    (case,) = [case for case in CASES if case.method == method]
    model, objective, dataset = get_peft_model(base_model(), case.config()), case.objective(class_prompts()), images()
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = dataset.collate([dataset[position] for position in range(4)])
    asked = []
    for layer in (DelegatingLayer, SlotProjection):
        found = layer.__getattr__
        monkeypatch.setattr(layer, "__getattr__", lambda self, name, f=found: (asked.append(name), f(self, name))[1])
    objective(model, batch).loss.backward()
    assert asked == []
