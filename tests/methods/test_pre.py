"""PRE's residual by hand, its collapse into a CoOp adapter, resuming, and what it refuses."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm import CoOpConfig, PREObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.conversion.formats import export
from peft_vlm.errors import AdapterError
from peft_vlm.methods.pre import preset_for
from peft_vlm.models.towers import towers_of
from peft_vlm.text import encode_classes
from tests.cases import CASES as ALL_CASES
from tests.cases import class_prompts, images, perturb
from tests.tiny import tiny_clip

(CASE,) = [case for case in ALL_CASES if case.method == "pre"]


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), CASE.config(**settings))
    perturb(model)
    return model.eval()


def trained(folder, **settings):
    """Three steps; the model at their end."""
    model = adapted()
    args = VLMTrainingArguments(
        output_dir=str(folder),
        **({"max_steps": 3, "save_strategy": "steps", "save_steps": 2} | settings),
        learning_rate=0.01,
        warmup_epochs=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    VLMTrainer(model, args, train_dataset=images(), objective=PREObjective(class_prompts())).train()
    return model


@torch.no_grad()
def test_a_perceptron_adds_to_each_vector_what_it_makes_of_it():
    """By hand: v + W2 relu(W1 v + b1) + b2."""
    layer = towers_of(adapted(network="mlp")).token_embedding
    network, vectors = layer.networks["default"], layer.prompts["default"]
    for row, vector in zip(layer.context("default"), vectors, strict=True):
        hidden = (network.weight1 @ vector + network.bias1).relu()
        assert_close(row, vector + network.weight2 @ hidden + network.bias2, rtol=1e-5, atol=1e-5)


def test_an_lstm_reads_the_vectors_in_both_directions():
    """A change of the last vector reaches the first, and the other way round."""
    layer = towers_of(adapted(num_text_tokens=3)).token_embedding
    before = layer.context("default").detach()
    for changed, seen in ((0, 2), (2, 0)):
        with torch.no_grad():
            layer.prompts["default"][changed] += 1
        assert (layer.context("default").detach()[seen] - before[seen]).abs().max() > 1e-4
        with torch.no_grad():
            layer.prompts["default"][changed] -= 1


def test_a_finished_run_leaves_an_ordinary_coop_adapter(tmp_path):
    """Whoever loads it needs no network, and the outputs are those of the training."""
    model = trained(tmp_path)
    features = encode_classes(model, class_prompts())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "COOP"
    assert config["network"] is None
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path).eval()
    assert torch.equal(encode_classes(again, class_prompts()), features)
    checkpoint = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert len(checkpoint) == 9, "vectors and network"
    assert json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())["network"] == "lstm"


@pytest.mark.parametrize("network", ["lstm", "mlp"])
def test_the_collapse_changes_no_output(network):
    model = adapted(network=network)
    before = encode_classes(model, class_prompts())
    towers_of(model).token_embedding.collapse("default")
    assert_close(encode_classes(model, class_prompts()), before, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "network" in name]


def test_an_adapter_without_a_network_and_an_unknown_one_are_refused(tmp_path):
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2))
    with pytest.raises(ValueError, match="`network`=None. Pass `CoOpConfig"):
        PREObjective(class_prompts()).prepare(model, images())
    with pytest.raises(ValueError, match=r"\('lstm', 'mlp'\), got 'transformer'"):
        CoOpConfig(network="transformer")
    with pytest.raises(AdapterError, match="PRE training that has not ended"):
        export(adapted(), tmp_path / "coop.pth")


def test_the_preset_is_the_official_one():
    preset = preset_for()
    assert preset.config == {"num_text_tokens": 4, "context_init": "a photo of a", "network": "lstm"}
    assert preset.training["num_train_epochs"] == 50
