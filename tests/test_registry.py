"""Registration with PEFT, and the traps of PEFT and transformers that an out-of-tree method meets."""

import copy
import dataclasses
import importlib
import json
import pickle

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModel, LoraConfig, LoraModel, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForZeroShotImageClassification, CLIPModel, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION

import peft_vlm
from peft_vlm import SkipTuningConfig, registry
from peft_vlm.errors import AdapterError, PeftVLMError, PeftVLMWarning, UnsupportedModelError
from peft_vlm.registry import ADAPTERS, METHODS, AdapterType, extend_peft_type, register_adapter, register_method
from peft_vlm.text import reserve_slots
from tests import forked
from tests.cases import (
    ADAPTER_CASES,
    Case,
    base_model,
    class_prompts,
    images,
    logits_of,
    perturb,
    pixels,
    processor,
)


def test_the_new_members_are_ordinary_members():
    """A plain string in PEFT's tables breaks `.value`, `mixed=True` and transformers' loader."""
    assert ADAPTERS
    for name in ADAPTERS:
        member = PeftType[name.upper()]
        assert member is PeftType(name.upper()) is getattr(PeftType, name.upper())
        assert member in list(PeftType)
        assert member.value == name.upper()
        assert hash(member) == hash(name.upper())
        assert pickle.loads(pickle.dumps(member)) is member is copy.deepcopy(member)
        assert json.loads(json.dumps(member)) == name.upper()
        assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == name + "_"
    assert extend_peft_type("SKIP_TUNING") is PeftType["SKIP_TUNING"]


def test_registering_the_same_classes_again_changes_nothing():
    register_adapter(ADAPTERS["skip_tuning"])
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["SKIP_TUNING"]] is SkipTuningConfig


def test_a_reload_is_refused_with_advice(tmp_path):
    """Reloaded classes would not match the objects made before."""
    log = tmp_path / "log.txt"
    assert forked.wait(forked.start(log, reload_a_method), log) != 0
    assert "Restart Python instead of reloading peft_vlm" in log.read_text()


def reload_a_method() -> None:
    """What a notebook's autoreload does."""
    method = importlib.import_module("peft_vlm.methods.skip_tuning")
    importlib.reload(importlib.import_module("peft_vlm.methods.skip_tuning.config"))
    importlib.reload(method)


def test_a_name_that_peft_owns_is_refused():
    """What a later PEFT with a method of the same name would look like."""
    with pytest.raises(PeftVLMError, match=r"'ia3': the name belongs to `peft\..*Use the method of that package"):
        register_adapter(dataclasses.replace(ADAPTERS["skip_tuning"], name="ia3"))
    assert "ia3" not in ADAPTERS


def test_a_type_of_peft_itself_can_be_an_adapter_type(monkeypatch):
    """Methods that train PEFT's LoRA need its record, and PEFT's own registration must stay as it is."""
    monkeypatch.setattr(registry, "ADAPTERS", dict(ADAPTERS))
    lora = {"name": "lora", "config": LoraConfig, "tuner": LoraModel, "title": "LoRA", "trained": "low-rank updates"}
    register_adapter(AdapterType(**lora, paper=ADAPTERS["coop"].paper))
    assert registry.ADAPTERS["lora"].config is LoraConfig is PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]


def test_a_method_needs_a_registered_adapter_type():
    """A misspelt type would be found in the middle of somebody's run."""
    with pytest.raises(PeftVLMError, match=r"'coop' to train one of .*got 'cop'\. Register"):
        register_method(dataclasses.replace(METHODS["coop"], adapter="cop"))
    assert METHODS["coop"].adapter_type is ADAPTERS["coop"]


@pytest.fixture(params=ADAPTER_CASES, ids=lambda case: case.adapter)
def saved(request, tmp_path):
    """A perturbed adapter on disk, its base model's folder, and the logits."""
    base = tmp_path / "base"
    model = base_model()
    model.save_pretrained(base)
    processor().save_pretrained(base)
    model = type(model).from_pretrained(base)
    adapted = get_peft_model(model, request.param.config())
    perturb(adapted)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    return request.param, base, tmp_path / "adapter", logits(request.param, adapted)


def logits(case: Case, model: torch.nn.Module) -> torch.Tensor:
    return logits_of(case, model, pixels(3))


def test_auto_classes_find_the_base(saved):
    case, _, adapter, expected = saved
    auto = AutoPeftModel.from_pretrained(adapter)
    assert isinstance(auto, PeftModel)
    assert torch.equal(logits(case, auto), expected)
    plain = AutoModelForZeroShotImageClassification.from_pretrained(adapter)
    assert torch.equal(logits(case, plain), expected)


def test_transformers_own_loader_gives_the_adapters_logits(saved):
    case, _, adapter, expected = saved
    model = base_model()
    model.load_adapter(str(adapter), adapter_name="tuned")
    assert torch.equal(logits(case, model), expected)


def test_transformers_own_switch_works_or_names_the_peft_it_needs(saved):
    """transformers 5.24 switches with peft 0.22 and later only; a switch that did nothing would go unnoticed."""
    case, _, adapter, expected = saved
    model = base_model()
    before = logits(case, model)
    model.load_adapter(str(adapter), adapter_name="tuned")
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match=f"use a version >= {MIN_PEFT_VERSION}"):
            model.disable_adapters()
        return
    model.disable_adapters()
    assert torch.equal(logits(case, model), before)
    model.enable_adapters()
    assert torch.equal(logits(case, model), expected)


def test_a_new_process_gives_bitwise_the_same_logits(saved, tmp_path):
    """Weights, configuration and buffers are all in the folder; nothing hides in the process."""
    case, base, adapter, expected = saved
    forked.run(tmp_path / "log.txt", save_logits, case.adapter, str(base), str(adapter), str(tmp_path))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def save_logits(kind: str, base: str, adapter: str, folder: str) -> None:
    """Logits of an adapter that is loaded under another name."""
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter, adapter_name="again").eval()
    (case,) = [case for case in ADAPTER_CASES if case.adapter == kind]
    torch.save(logits(case, model), f"{folder}/logits.pt")


def test_the_zero_shot_pipeline_gives_the_adapters_scores_or_refuses(saved):
    """Its template writes the start token where an adapter has learned context.

    A model that reads no texts must not give scores under the labels of the call.
    """
    case, _, adapter, _ = saved
    model = AutoPeftModel.from_pretrained(adapter)
    tools = processor()
    classify = pipeline(
        "zero-shot-image-classification",
        model=model.get_base_model(),
        tokenizer=tools.tokenizer,
        image_processor=tools.image_processor,
    )
    image, names = images(per_class=1).image(0), ["red", "green", "blue"]
    if case.text_free or case.image_conditioned:
        with pytest.raises(AdapterError, match="reads no text|depend on the image"):
            classify(image, names)
        return
    prompts = reserve_slots(model, class_prompts(names))
    text = tools.tokenizer.decode(prompts.input_ids[0]).replace("<|endoftext|>", "")
    template = text.removeprefix("<|startoftext|>").replace("red", "{}")
    scores = {row["label"]: row["score"] for row in classify(image, names, hypothesis_template=template)}
    inputs = tools.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, input_ids=prompts.input_ids).logits_per_image
    expected = dict(zip(names, logits.softmax(-1)[0].tolist(), strict=True))
    assert scores == pytest.approx(expected, rel=1e-4)


def test_an_adapter_of_another_base_is_refused_with_the_sizes(saved):
    """PEFT's own message is a list of size mismatches, or nothing at all when sizes agree but depth does not."""
    case, _, adapter, _ = saved
    if case.fits_any_base:  # what is not known of the other model is said
        with pytest.warns(PeftVLMWarning, match="No image processor was found"):
            model = PeftModel.from_pretrained(base_model(layers=4), adapter)
        stored = load_file(adapter / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model)
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[key], stored[key]) for key in stored)
        return
    with pytest.raises(AdapterError, match=r"text_num_hidden_layers: adapter 3, this model 4"):
        PeftModel.from_pretrained(base_model(layers=4), adapter)
    with pytest.raises(AdapterError, match=r"projection_dim: adapter 16, this model 24"):
        PeftModel.from_pretrained(base_model(dim=24), adapter)


def test_a_truncated_weights_file_is_named(saved):
    _, _, adapter, _ = saved
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors.*cut off or damaged"):
        PeftModel.from_pretrained(base_model(), adapter)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_weights_file_that_does_not_fit_is_refused(saved, change):
    """PEFT warns about missing keys and goes on with initial values."""
    from safetensors.torch import load_file, save_file

    case, _, adapter, _ = saved
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensor = tensors.pop(key)
    if change != "missing":
        tensors[key + ".extra" if change == "unknown" else key] = torch.zeros(3, *tensor.shape)
    save_file(tensors, path)
    message = rf"{change} 'base_model" if change != "shape" else r"other shape .*file \(3,"
    if change == "shape" and case.method != "skip_tuning":  # the header alone shows it, before there is a model
        message = r"by the configuration, got 'base_model.* of shape \(3,"
    elif case.method in ("coop", "promptkd", "tvp"):  # the one tensor of its kind is gone
        message = "by the configuration, got 'no tensor'"
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base_model(), adapter)


def test_resumed_training_needs_is_trainable(saved, tmp_path):
    from peft_vlm import VLMTrainer, VLMTrainingArguments

    case, _, adapter, _ = saved
    model = PeftModel.from_pretrained(base_model(), adapter)
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(PeftVLMError, match="is_trainable=True"):
        VLMTrainer(model, args, train_dataset=images(), objective=case.objective(class_prompts()))
    model = PeftModel.from_pretrained(base_model(), adapter, is_trainable=True)
    fresh = get_peft_model(base_model(), case.config())
    trained = {n: p.shape for n, p in fresh.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == trained
    assert len(trained) > 0


def test_quantised_layers_are_refused():
    """Selective tuning copies weights; a quantised layer has none to copy."""
    from peft_vlm.adapters.layer import LayerCopy

    with pytest.raises(UnsupportedModelError, match="load the base model unquantised"):
        LayerCopy(torch.nn.Conv2d(3, 3, 1), prefix="skip_tuning_")


def test_fp16_on_a_cpu_is_refused(tmp_path):
    """Accelerate ignores it there without a word."""
    with pytest.raises(ValueError, match="silently ignored"):
        peft_vlm.VLMTrainingArguments(output_dir=str(tmp_path), fp16=True, use_cpu=True)


def test_importing_twice_is_harmless():
    assert importlib.import_module("peft_vlm") is peft_vlm
