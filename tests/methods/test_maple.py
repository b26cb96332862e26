"""MaPLe's coupling by hand, its start, folding into PromptSRC, and what it refuses."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_vlm import MaPLeConfig, PromptSRCConfig, VLMTrainer, VLMTrainingArguments
from peft_vlm.errors import AdapterError
from peft_vlm.export import plain_classifier
from peft_vlm.methods.maple import fold, preset_for
from peft_vlm.models.towers import towers_of
from peft_vlm.text import encode_classes, reserve_slots
from tests.cases import CASES as ALL_CASES
from tests.cases import class_prompts, images, perturb, pixels
from tests.tiny import clip_processor, colour_names, tiny_clip

(CASE,) = [case for case in ALL_CASES if case.method == "maple"]


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), CASE.config(**settings))
    perturb(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels(), input_ids=reserve_slots(model, class_prompts()).input_ids).logits_per_image


@torch.no_grad()
def test_a_vision_token_is_weight_times_text_token_plus_bias():
    model = adapted(depth=3)
    towers = towers_of(model)
    pairs = [(towers.token_embedding, towers.vision_embeddings)]
    pairs += list(zip(towers.text_layers[1:3], towers.vision_layers[1:3], strict=True))
    assert len(pairs) == 3
    for text, vision in pairs:
        tokens, weight = text.maple_prompt["default"], vision.maple_weight["default"]
        by_hand = [[sum(w * t for w, t in zip(row, token, strict=True)) for row in weight] for token in tokens]
        expected = torch.tensor(by_hand) + vision.maple_bias["default"]
        assert torch.allclose(vision.active_prompt(torch.empty(0)), expected, atol=1e-5)


def test_deep_projections_start_as_copies_of_one():
    """As in the official code; the projection at the entrance is another one."""
    torch.manual_seed(0)
    layers = towers_of(get_peft_model(tiny_clip(), CASE.config(depth=3))).vision_layers
    entrance = towers_of(get_peft_model(tiny_clip(), CASE.config(depth=3))).vision_embeddings
    assert torch.equal(layers[1].maple_weight["default"], layers[2].maple_weight["default"])
    assert layers[1].maple_weight["default"] is not layers[2].maple_weight["default"]
    assert not torch.equal(layers[1].maple_weight["default"], entrance.maple_weight["default"])


def test_a_copy_of_a_model_projects_its_own_text_tokens():
    """A reference to the text layers of the first model would tie both together."""
    model = adapted()
    twin = copy.deepcopy(model)
    before = logits(twin)
    with torch.no_grad():
        towers_of(model).token_embedding.maple_prompt["default"] += 1
    assert torch.equal(logits(twin), before)
    assert not torch.equal(logits(model), before)


def test_a_folded_adapter_gives_the_same_logits_with_the_classes_of_the_first(tmp_path):
    model = adapted(depth=3)
    config = model.active_peft_config
    config.class_names, config.template = list(colour_names()), "a {}."
    config.image_mean, config.image_std, config.image_size = [0.5] * 3, [0.25] * 3, [16, 16]
    fold(model, tmp_path / "folded")
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path / "folded").eval()
    assert isinstance(again.active_peft_config, PromptSRCConfig)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    for name in ("class_names", "template", "image_mean", "image_size", "base_architecture", "base_digest"):
        assert getattr(again.active_peft_config, name) == getattr(config, name)
    sizes = [sum(p.numel() for n, p in m.named_parameters() if "_prompt" in n) for m in (model, again)]
    assert sizes == [3 * 2 * 32, 2 * 3 * 2 * 32]


def test_what_cannot_be_folded_is_refused(tmp_path):
    model = get_peft_model(tiny_clip(), PromptSRCConfig(context_init=None))
    with pytest.raises(AdapterError, match="Expected a MaPLe adapter .*got PromptSRCConfig"):
        fold(model, tmp_path / "folded")
    model = get_peft_model(tiny_clip(), CASE.config(modules_to_save=["visual_projection"]))
    with pytest.raises(AdapterError, match=r"with \['visual_projection'\]"):
        fold(model, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_trained_adapter_goes_on_where_it_stopped(tmp_path):
    """What is saved is what is trained: projections, not only their results."""
    model = adapted()
    args = VLMTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.01, warmup_epochs=0, use_cpu=True, disable_tqdm=True
    )
    VLMTrainer(model, args, train_dataset=images(), objective=CASE.objective(class_prompts())).train()
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=True)
    trained = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trained} == {"maple_prompt", "maple_weight", "maple_bias"}
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in trained.items())


def test_an_export_has_the_projected_tokens():
    model = adapted(depth=3)
    features = encode_classes(model, class_prompts())
    classifier = plain_classifier(model, features, colour_names(), image_processor=clip_processor())
    assert torch.allclose(classifier(pixels()), logits(model), atol=1e-4)


def test_the_presets_are_the_official_ones():
    preset = preset_for()
    assert preset.config == {"num_text_tokens": 2, "depth": 9, "context_init": "a photo of a"}
    assert (preset.training["learning_rate"], preset.training["num_train_epochs"]) == (0.0035, 5)
    assert preset_for("cross_dataset").config["depth"] == 3
    assert MaPLeConfig(**preset.config).num_text_tokens == 2
    with pytest.raises(ValueError, match="'base_to_new', 'cross_dataset'"):
        preset_for("few_shot")
