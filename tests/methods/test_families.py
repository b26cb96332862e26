"""Every cell of the table in docs/families.md: the method works on the family, or refuses it by name."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
)

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import image_features
from peft_vlm.text.class_features import conditioned_logits
from peft_vlm.text.prompts import reserve_slots
from tests.cases import ADAPTER_CASES, class_prompts, pixels
from tests.tiny import noise_image, tiny_clip, tiny_siglip
from tests.tiny_mllm import ARCHITECTURES, BOS, EOS, IMAGE, PAD, blip, tiny_mllm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
CASE_OF = {case.adapter: case for case in ADAPTER_CASES}


def table() -> dict[tuple[str, str], str]:
    """Cells of the page by (model, method)."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if "|" in line]
    header, _, *body = rows
    return {(row[0], method): cell for row in body for method, cell in zip(header[1:], row[1:], strict=True)}


def naflex() -> tuple[nn.Module, dict[str, Tensor]]:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Siglip2Model(Siglip2Config(text_config=text, vision_config=tower)), {}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(**sizes)), {}


def blip_with_t5() -> tuple[nn.Module, dict[str, Tensor]]:
    """BLIP-2 with a language model that has an encoder; it is told the answer apart."""
    text = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    text |= {"vocab_size": 300, "dropout_rate": 0.0, "pad_token_id": PAD, "eos_token_id": EOS}
    text |= {"decoder_start_token_id": PAD}
    model = Blip2ForConditionalGeneration(Blip2Config(**(blip() | {"text_config": text})))
    inputs = tiny_mllm("blip_2").inputs([noise_image(40, 40)])
    return model, inputs | {"labels": torch.tensor([[40, 41, EOS]])}


def family(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model and inputs for it, without what a method adds to them."""
    if name in ARCHITECTURES:
        mllm = tiny_mllm(name)
        inputs = mllm.inputs([noise_image(60, 40)])
        return mllm.model, inputs | {"labels": inputs["input_ids"]}
    if name == "CLIPModel":
        return tiny_clip(), {"pixel_values": pixels(), "input_ids": class_prompts().input_ids}
    if name == "SiglipModel":
        return tiny_siglip(), {"pixel_values": pixels(), "input_ids": torch.full((3, 24), BOS)}
    return {"Siglip2Model": naflex, "BertModel": bert, "blip_2 with T5": blip_with_t5}[name]()


def test_the_table_has_every_method_and_every_tested_family():
    """A new method or architecture without a row would be promised nothing and tested nowhere."""
    cells = table()
    assert len(cells) >= 85
    assert {method for _, method in cells} == {case.adapter for case in ADAPTER_CASES}
    others = {"CLIPModel", "SiglipModel", "Siglip2Model", "BertModel", "blip_2 with T5"}
    assert {model for model, _ in cells} == set(ARCHITECTURES) | others
    assert set(cells.values()) == {"works", "refused"}


@pytest.mark.parametrize(("name", "method", "cell"), [(*key, cell) for key, cell in table().items()])
def test_the_cell_is_true(name, method, cell):
    torch.manual_seed(0)
    model, inputs = family(name)
    config = CASE_OF[method].config(**({"shrink": "none"} if method == "tvp" else {}))
    if cell == "refused":
        with pytest.raises(UnsupportedModelError) as caught:
            get_peft_model(model, config)
        message = str(caught.value)
        assert type(model).__name__ in message
        assert message.endswith(".")
        assert len(message.split(". ")) > 1, "says what was expected, but not what to do"
        return
    adapted = get_peft_model(model, config)
    if name == "CLIPModel" and method == "promptkd":
        inputs = {"pixel_values": inputs["pixel_values"]}
    elif name == "CLIPModel":
        inputs["input_ids"] = reserve_slots(adapted, class_prompts()).input_ids
    if CASE_OF[method].image_conditioned:
        score = conditioned_logits(adapted, class_prompts(), image_features(adapted, pixels())).square().mean()
    else:
        output = adapted(**inputs)
        score = output.loss if "labels" in inputs else output.logits_per_image.square().mean()
    score.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert any((p.grad != 0).any() for p in trained)


def test_the_models_are_what_they_are_called():
    assert type(family("blip_2 with T5")[0].language_model).__name__ == "T5ForConditionalGeneration"
    assert IMAGE in family("llava")[1]["input_ids"]
