"""Skip Tuning on every model family of its table (docs/methods/skip_tuning.md): works, or is refused by name."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import SkipTuningConfig, SkipTuningObjective
from peft_vlm.data.dataset import collate
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.text.prompts import tokenize_classes
from tests.cases import images
from tests.tiny import tiny_siglip, tiny_tokenizer


def test_siglip_trains_its_upper_layers_and_heads():
    """Family table: SigLIP works; its pooling attention stays frozen, its text is not cut."""
    model = get_peft_model(tiny_siglip(), SkipTuningConfig(start_layer=1))
    prompts = tokenize_classes(tiny_tokenizer(), ["red", "blue"], template="{}", max_length=24, pad_to_max=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("text_model.head.skip_tuning_weight" in name for name in names)
    assert not any("head.attention" in name or "probe" in name for name in names)
    dataset = images(per_class=2).restrict([0, 1])
    objective = SkipTuningObjective(prompts, batch_composition="random", top_ratio=1)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = collate([dataset[i] for i in range(4)])
    output = objective(model, batch)
    pixels = torch.stack([dataset[i]["pixel_values"] for i in range(4)])
    expected = model(pixel_values=pixels, input_ids=prompts.input_ids).logits_per_image
    assert_close(output.logits, expected, rtol=1e-5, atol=1e-4)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_naflex_siglip_is_refused_with_advice():
    """Family table: its inputs carry a size per image, which cached features do not keep."""
    from transformers import Siglip2Config, Siglip2Model

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=tower))
    with pytest.raises(UnsupportedModelError, match="fixed-resolution checkpoint"):
        get_peft_model(model, SkipTuningConfig(start_layer=0))


def test_other_architectures_are_refused_by_name():
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(UnsupportedModelError, match="'CLIPModel'.*got `BertModel`"):
        get_peft_model(bert, SkipTuningConfig(start_layer=0))
