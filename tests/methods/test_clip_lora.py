"""CLIP-LoRA's settings: what a run by its name trains, and the official preset."""

import pytest
from peft import LoraConfig, get_peft_model

from peft_vlm import CLIPLoRAObjective, CoOpConfig, VLMTrainer, VLMTrainingArguments
from peft_vlm.errors import PeftVLMError
from peft_vlm.methods.clip_lora import preset_for
from peft_vlm.registry import METHODS
from tests.cases import class_prompts, images
from tests.tiny import tiny_clip


def test_the_preset_is_the_official_one():
    preset = preset_for(shots=4)
    config = LoraConfig(**preset.config)
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (2, 1, True, 0.25)
    assert preset.training["max_steps"] == 2000
    assert preset.training["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
    with pytest.raises(ValueError, match="1 or more, got 0"):
        preset_for(shots=0)
    with pytest.raises(ValueError, match="'few_shot'"):
        preset_for("base_to_new", shots=1)


def test_a_run_by_name_starts_from_the_official_adapter():
    """PEFT's own defaults are for language models: rank 8, no dropout, alpha / r."""
    assert METHODS["clip_lora"].defaults == preset_for(shots=1).config


def test_the_scale_and_the_number_of_parameters():
    """alpha / sqrt(r), and r * (in + out) for query, key and value of each layer."""
    model = get_peft_model(tiny_clip(), LoraConfig(**preset_for(shots=1).config))
    layer = model.get_base_model().text_model.encoder.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(2**-0.5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * 3 * 2 * (32 + 32)


def test_other_adapters_are_refused_with_the_objective_that_takes_them(tmp_path):
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2))
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(PeftVLMError, match=r"`LoraConfig` for `CLIPLoRAObjective`.*`ClassificationObjective`"):
        VLMTrainer(model, args, train_dataset=images(), objective=CLIPLoRAObjective(class_prompts()))
