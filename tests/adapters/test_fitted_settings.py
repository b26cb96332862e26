"""Settings that nobody asked for fit the base model, and are recorded as numbers; those that were asked for stay."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_vlm import CoOpConfig, MaPLeConfig, PromptKDConfig, PromptSRCConfig, RPPConfig, SkipTuningConfig
from tests.tiny import tiny_clip
from tests.tiny_questions import tiny_llava

CONFIGS = {
    "coop": lambda **s: CoOpConfig(**s),
    "maple": lambda **s: MaPLeConfig(context_init=None, **s),
    "promptkd": lambda **s: PromptKDConfig(class_dim=24, **s),
    "promptsrc": lambda **s: PromptSRCConfig(context_init=None, **s),
    "rpp": lambda **s: RPPConfig(context_init=None, **s),
    "skip_tuning": lambda **s: SkipTuningConfig(**s),
}
#: Numbers for towers of 12 layers, which are the official ones, and for those of 5; the text tower reads 40 tokens.
EXPECTED = {
    "coop": ({"num_text_tokens": 10}, {"num_text_tokens": 10}),
    "maple": ({"depth": 9}, {"depth": 3}),
    "promptkd": ({"vision_depth": 9}, {"vision_depth": 3}),
    "promptsrc": ({"text_depth": 9, "vision_depth": 9}, {"text_depth": 3, "vision_depth": 3}),
    "rpp": ({"text_depth": 9, "vision_depth": 9}, {"text_depth": 3, "vision_depth": 3}),
    "skip_tuning": ({"start_layer": 6, "text_start_layer": None}, {"start_layer": 2, "text_start_layer": None}),
}


@pytest.mark.parametrize("layers", [12, 5])
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_configuration_without_settings_works_and_records_numbers(method, layers, tmp_path, caplog) -> None:
    """Depth 9 was refused on a text tower of 4 layers, though nobody had asked for 9."""
    base = tiny_clip(layers=layers)
    model = get_peft_model(base, CONFIGS[method]())
    expected = EXPECTED[method][layers == 5]
    assert {name: getattr(model.active_peft_config, name) for name in expected} == expected
    assert ("settings fit it" in caplog.text) is (layers == 5 or method == "coop"), "said where they differ"
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: written[name] for name in expected} == expected
    loaded = PeftModel.from_pretrained(tiny_clip(layers=layers), tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SkipTuningConfig(start_layer=6), "`start_layer` from 0 to 4"),
        (SkipTuningConfig(text_start_layer=6), "`text_start_layer` from 0 to 4"),
        (PromptSRCConfig(context_init=None, text_depth=9), "`text_depth` from 0 to 5"),
        (PromptSRCConfig(context_init=None, vision_depth=9), "`vision_depth` from 0 to 5"),
        (RPPConfig(context_init=None, text_depth=9), "`text_depth` from 0 to 5"),
        (PromptKDConfig(class_dim=24, vision_depth=9), "`vision_depth` from 0 to 5"),
    ],
)
def test_what_was_asked_for_is_not_changed(config: PeftConfig, message: str) -> None:
    """A setting that silently becomes another one makes a result that nobody can repeat."""
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_clip(layers=5), config)


def test_towers_of_different_depth_get_numbers_of_their_own() -> None:
    model = tiny_clip(layers=6)
    model.text_model.encoder.layers = model.text_model.encoder.layers[:4]
    model.config.text_config.num_hidden_layers = 4
    config = get_peft_model(model, SkipTuningConfig()).active_peft_config
    assert config.start_layers == (3, 2)


def test_a_language_model_gets_a_start_layer() -> None:
    config = get_peft_model(tiny_llava(), SkipTuningConfig()).active_peft_config
    layers = tiny_llava().config.text_config.num_hidden_layers
    assert config.start_layers[1] == layers // 2


def test_a_tuned_tower_has_no_visual_prompts_unless_they_were_asked_for() -> None:
    config = get_peft_model(tiny_clip(), PromptKDConfig(class_dim=24, tune_vision=True)).active_peft_config
    assert config.vision_depth == 0
    with pytest.raises(ValueError, match="`vision_depth`=0 with `tune_vision`"):
        PromptKDConfig(class_dim=24, tune_vision=True, vision_depth=9)


def test_words_decide_how_many_context_vectors_there_are() -> None:
    config = CoOpConfig(context_init="a b c", context_init_ids=[1, 2, 3])
    assert get_peft_model(tiny_clip(), config).active_peft_config.num_text_tokens == 3
