"""Every promise of docs/architecture.md on every registered method."""

import copy
import json
import pickle
from importlib import resources
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm.data.dataset import collate
from peft_vlm.errors import AdapterError
from peft_vlm.registry import ADAPTERS, METHODS
from tests.cases import (
    ADAPTER_CASES,
    ALL_ADAPTER_CASES,
    CASES,
    Case,
    base_model,
    images,
    logits_of,
    model_inputs,
    perturb,
    pixels,
    prepared,
)

ROOT = Path(__file__).resolve().parent.parent
#: What every training method has, beside the example of its adapter type.
DOCUMENTS = (("tests/parity/test_", "py"), ("tests/methods/test_", "py"), ("docs/methods/", "md"))


@pytest.fixture(params=ALL_ADAPTER_CASES, ids=lambda case: case.adapter)
def case(request) -> Case:
    """One row per adapter type."""
    return request.param


@pytest.fixture(params=ADAPTER_CASES, ids=lambda case: case.adapter)
def own(request) -> Case:
    """One row per adapter type of this package: promises that PEFT does not make for its own."""
    return request.param


@pytest.fixture(params=CASES, ids=lambda case: case.method)
def trained_by(request) -> Case:
    """One row per training method."""
    return request.param


def adapted(case: Case, *, name: str = "default", move: bool = True, **settings) -> PeftModel:
    torch.manual_seed(0)  # random prompts, the same in every model
    model = get_peft_model(base_model(), case.config(**settings), adapter_name=name)
    if move:
        perturb(model)
    return model.eval()


def training_batch(dataset, indices) -> dict[str, torch.Tensor]:
    return collate([dataset[i] for i in indices])


def test_every_registered_method_has_a_case_and_a_module_and_documents():
    """A method that slips past the contract would be promised but untested."""
    assert len(CASES) >= 1
    assert sorted(METHODS) == sorted(case.method for case in CASES)
    assert sorted(ADAPTERS) == sorted(case.adapter for case in ALL_ADAPTER_CASES)
    folders = {p.name for p in resources.files("peft_vlm.methods").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert folders == set(METHODS)
    paths = {f"{place}{method}.{kind}" for method in METHODS for place, kind in DOCUMENTS}
    paths |= {f"examples/train_{case.adapter}.py" for case in ADAPTER_CASES}
    assert len(paths) == 3 * len(METHODS) + len(ADAPTER_CASES)
    assert not [path for path in sorted(paths) if not (ROOT / path).is_file()]


@pytest.mark.smoke
def test_adapter_acts_and_disabling_restores_the_base_bitwise(case):
    expected = logits_of(case, base_model())
    model = adapted(case)
    assert (logits_of(case, model) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits_of(case, model), expected)


@pytest.mark.smoke
def test_only_adapter_tensors_train_and_each_gets_a_gradient(trained_by):
    """A dead tensor costs memory and file size and never learns."""
    model = adapted(trained_by)
    dataset = images()
    objective = prepared(trained_by, model, dataset)
    objective(model.train(), training_batch(dataset, range(0, 24, 3))).loss.backward()
    buffers = {name.replace(".default", "") for name, _ in model.named_buffers()}
    own = set(get_peft_model_state_dict(model)) - buffers
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(own) > 0
    for name, parameter in model.named_parameters():
        if name not in trainable:
            assert parameter.grad is None, name
        elif not any(name.removesuffix(".default").endswith(ending) for ending in trained_by.zero_gradients):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_is_bitwise_equal_under_any_name(case, tmp_path, name, low_cpu_mem_usage):
    """A name left in the keys loads as random values under another name, with only a warning."""
    model = adapted(case)
    expected, state = logits_of(case, model), get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits_of(case, again), expected)
    reloaded = get_peft_model_state_dict(again, adapter_name=name)
    assert state.keys() == reloaded.keys()
    assert all(torch.equal(state[key], reloaded[key]) for key in state)


def test_the_file_holds_adapter_tensors_only(case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not list(tmp_path.glob("*.bin"))
    assert len(stored) >= len(trained) > 0
    assert not any("default" in key or "base_layer" in key for key in stored)
    buffers = sum(t.numel() for t in stored.values()) - sum(p.numel() for p in trained)
    assert buffers == 0 or len(stored) > len(trained)


def test_two_adapters_coexist(case):
    model = adapted(case)
    first = logits_of(case, model)
    model.add_adapter("second", case.config(init_weights=False, **(case.other_shape or {})))
    assert torch.equal(logits_of(case, model), first)
    model.set_adapter("second")
    second = logits_of(case, model.eval())
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits_of(case, model), first)
    model.delete_adapter("second")
    assert torch.equal(logits_of(case, model), first)
    assert torch.equal(logits_of(case, model.unload()), logits_of(case, base_model()))


def test_deleting_the_active_adapter_falls_back_to_the_other(case):
    model = adapted(case)
    first = logits_of(case, model)
    model.add_adapter("second", case.config(init_weights=False))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert torch.equal(logits_of(case, model), first)


def test_unload_leaves_no_trace(case):
    model = adapted(case).unload()
    assert type(model) is type(base_model())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base_model().named_modules()]
    assert torch.equal(logits_of(case, model), logits_of(case, base_model()))


def test_several_active_adapters_are_refused(own):
    model = adapted(own)
    model.add_adapter("second", own.config())
    with pytest.raises(AdapterError, match="one active adapter"):
        model.base_model.set_adapter(["default", "second"])


def test_mixed_batches_are_refused(own):
    """PEFT would drop the argument and run the active adapter for every row."""
    model = adapted(own)
    with pytest.raises(AdapterError, match="batch per adapter"):
        model(**model_inputs(own, model, pixels()), adapter_names=["default"] * 4)


def test_merging_is_exact_or_refused(own):
    model = adapted(own)
    expected = logits_of(own, model)
    if not own.can_merge:
        with pytest.raises(AdapterError, match="cannot be merged"):
            model.merge_and_unload()
        return
    model.merge_adapter()
    assert torch.equal(logits_of(own, model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits_of(own, model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(own, model), logits_of(own, base_model()))
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base_model())
    assert torch.equal(logits_of(own, merged), expected)


def test_configuration_survives_json(own, tmp_path):
    config = own.config()
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is ADAPTERS[own.adapter].config
    assert raw["peft_type"] == own.adapter.upper()
    assert raw["format_version"] == 1
    assert again.to_dict() == config.to_dict()


def test_impossible_settings_name_value_and_range(case):
    assert case.bad_settings
    for settings, message in case.bad_settings:
        with pytest.raises((ValueError, TypeError)) as caught:
            get_peft_model(base_model(), case.config(**settings))
        assert message in str(caught.value), settings


def test_a_newer_format_is_refused(own, tmp_path):
    own.config().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(AdapterError, match=r"got 99.*Install a newer release"):
        PeftConfig.from_pretrained(tmp_path)


def test_adapter_names_that_peft_would_lose_are_refused(own):
    """An adapter called like a module component loses tensors on saving."""
    with pytest.raises(AdapterError, match="no part of a module name"):
        adapted(own, name="layers")
    model = adapted(own)
    with pytest.raises(AdapterError, match="no part of a module name"):
        model.add_adapter("encoder", own.config())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_shapes_and_dtypes(case, dtype):
    expected = logits_of(case, adapted(case))
    torch.manual_seed(0)
    model = get_peft_model(base_model().to(dtype), case.config())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    perturb(model)
    actual = logits_of(case, model, pixels().to(dtype))
    assert actual.dtype == dtype
    assert_close(actual.float(), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


def test_bf16_autocast_keeps_the_loss(trained_by):
    model = adapted(trained_by)
    dataset = images()
    exact = prepared(trained_by, model, dataset)(model, training_batch(dataset, range(6))).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = prepared(trained_by, model, dataset)
        loss = objective(model, training_batch(dataset, range(6))).loss
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_keeps_the_gradients(trained_by):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(trained_by).train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        dataset = images()
        prepared(trained_by, model, dataset)(model, training_batch(dataset, range(6))).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_loss_terms_are_finite_scalars_that_sum_to_the_loss(trained_by):
    model = adapted(trained_by)
    dataset = images()
    output = prepared(trained_by, model, dataset)(model, training_batch(dataset, range(5)))
    assert output.loss_terms
    assert all(term.ndim == 0 and torch.isfinite(term) for term in output.loss_terms.values())
    assert_close(output.loss, sum(output.loss_terms.values()))
    assert output.logits.shape[0] == 5
    assert (output.labels < output.logits.shape[1]).all()
    assert not output.labels.is_floating_point()


def test_predicted_logits_are_those_of_the_model(trained_by):
    model = adapted(trained_by)
    dataset = images(per_class=1)
    objective = prepared(trained_by, model, dataset)
    with torch.no_grad():
        predicted = objective.predict(model, {"pixel_values": pixels()})
    assert_close(predicted, logits_of(trained_by, model), rtol=1e-5, atol=1e-4)


def test_pickle_and_deepcopy(case):
    model = adapted(case)
    expected = logits_of(case, model)
    assert torch.equal(logits_of(case, copy.deepcopy(model)), expected)
    assert torch.equal(logits_of(case, pickle.loads(pickle.dumps(model))), expected)
