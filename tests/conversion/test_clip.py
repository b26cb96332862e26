"""OpenAI's and open_clip's weights become CLIPs that give equal outputs."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, CLIPModel

from peft_vlm.conversion.clip import convert_clip, to_hf_names, to_openai_names
from peft_vlm.conversion.formats import convert
from peft_vlm.conversion.official_file import read_checkpoint
from peft_vlm.errors import AdapterError, UnsupportedModelError
from tests.conversion.official_files import official
from tests.parity.recorded import facts, recorded_clip, tensors

HEADS = {"vision_head_width": 32, "text_heads": 2}
"""The tiny CLIPs of the record have more and narrower heads than real ones."""


@pytest.fixture
def openai_weights() -> dict[str, torch.Tensor]:
    """The recorded student as OpenAI names it."""
    return to_openai_names(recorded_clip("weights_student").state_dict())


def test_names_are_those_of_the_official_files(openai_weights):
    """The trainers keep OpenAI's names below `image_encoder.` and `text_encoder.`; all frozen tensors are equal."""
    from peft_vlm.conversion.base_model import official_name

    recorded = read_checkpoint(official("B_ivlp_forward"))
    named = {official_name(name): tensor for name, tensor in openai_weights.items()}
    shared = named.keys() & recorded.keys()
    assert set(named) - shared == {"text_encoder.token_embedding.weight"}
    assert len(shared) == len(named) - 1 > 100
    assert all(torch.equal(named[name], recorded[name]) for name in shared)


def test_names_there_and_back(openai_weights):
    weights = recorded_clip("weights_student").state_dict()
    back = to_hf_names(openai_weights)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    with pytest.raises(
        AdapterError, match=r"vision transformer, got 'visual\.transformer\.resblocks\.0\.gate\.weight'"
    ):
        to_hf_names({"visual.transformer.resblocks.0.gate.weight": torch.ones(1)})


def test_openai_weights_give_the_recorded_logits(openai_weights, student_folder, tmp_path):
    """With the entries that OpenAI's archives hold beside the weights, in half precision where theirs are exact."""
    extra = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(642)}
    torch.save(openai_weights | extra, tmp_path / "tiny.pt")
    convert_clip(tmp_path / "tiny.pt", tmp_path / "clip", tokenizer=student_folder, **HEADS)
    model = AutoModel.from_pretrained(tmp_path / "clip").eval()
    recorded, case = tensors("A_zeroshot"), facts("A_zeroshot")
    with torch.no_grad():
        output = model(pixel_values=recorded["in.images"], input_ids=recorded["in.input_ids"])
    expected = recorded["expected.student.logits"]
    assert_close(output.logits_per_image, expected, rtol=0, atol=case["tolerance"]["logits_atol"])
    processor = AutoProcessor.from_pretrained(tmp_path / "clip")
    assert processor.image_processor.crop_size["height"] == 32
    assert processor.tokenizer("a photo of a cat.")["input_ids"][0] == 640


def test_open_clip_weights_with_their_settings(openai_weights, tmp_path):
    """A text tower of its own, plain GELU, other means: all of it stands in the configuration beside the weights."""
    renamed = {
        name if name.startswith(("visual", "logit")) else f"text.{name}": tensor
        for name, tensor in openai_weights.items()
    }
    torch.save({"state_dict": renamed | {"text.attn_mask": torch.zeros(77, 77)}}, tmp_path / "open_clip_model.bin")
    settings = {"vision_cfg": {"head_width": 32}, "text_cfg": {"heads": 2}}
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": pixels}))
    model = convert_clip(tmp_path / "open_clip_model.bin", tmp_path / "clip")
    expected = CLIPModel(model.config).eval()
    assert (model.config.text_config.hidden_act, model.config.vision_config.num_attention_heads) == ("gelu", 3)
    assert json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())["image_mean"] == pixels["mean"]
    expected.load_state_dict(recorded_clip("weights_student").state_dict())
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.tensor([[640, 5, 641], [640, 9, 641]])}
    with torch.no_grad():
        ours, theirs = (m(**inputs).logits_per_image for m in (CLIPModel.from_pretrained(tmp_path / "clip"), expected))
    assert torch.equal(ours, theirs)


def test_what_is_not_a_clip_is_named(openai_weights, tmp_path):
    def refused(extra: dict, message: str, error=UnsupportedModelError, drop: str = "") -> None:
        torch.save({k: v for k, v in openai_weights.items() if k != drop} | extra, tmp_path / "x.pt")
        with pytest.raises(error, match=message):
            convert_clip(tmp_path / "x.pt", tmp_path / "out", hidden_act="gelu", **HEADS)
        assert not (tmp_path / "out").exists()

    refused({"visual.layer1.0.conv1.weight": torch.ones(1)}, r"a CLIP with a ResNet \(RN50")
    refused({"logit_bias": torch.ones(1)}, "a SigLIP")
    refused({}, "names of OpenAI or open_clip", drop="visual.proj")
    refused({}, "do not make a complete CLIP.*ln_final|final_layer_norm", AdapterError, drop="ln_final.bias")
    torch.save(openai_weights, tmp_path / "plain.pt")
    with pytest.raises(AdapterError, match="a state dict does not say"):
        convert_clip(tmp_path / "plain.pt", tmp_path / "out", **HEADS)
    with pytest.raises(AdapterError, match="is a complete CLIP and no adapter"):
        convert(tmp_path / "plain.pt", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="new or empty folder"):
        convert_clip(tmp_path / "plain.pt", tmp_path / "out", hidden_act="quick_gelu", **HEADS)
