"""What PEFT's own test-suite asks of every method (the ideas of its `PeftCommonTester`), on every method of this
package.

Left out, because they ask for something these methods do not have: generation (two-tower models have none), input
embeddings (`CLIPModel` has none), weighted adapter combination and LoRA conversion.
"""

import pytest
import torch
from peft import PeftModel, get_model_status, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft import set_peft_model_state_dict as set_state
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peft_vlm.errors import AdapterError
from peft_vlm.models.towers import image_features
from peft_vlm.text import conditioned_logits
from tests.cases import ADAPTER_CASES, Case, base_model, class_prompts, logits_of, model_inputs, perturb, pixels


@pytest.fixture(params=ADAPTER_CASES, ids=lambda case: case.adapter)
def case(request) -> Case:
    return request.param


def inputs(case: Case, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model_inputs(case, model, pixels(3))


def logits(case: Case, model: torch.nn.Module) -> torch.Tensor:
    return logits_of(case, model.eval(), pixels(3))


def adapted(case: Case) -> PeftModel:
    model = get_peft_model(base_model(), case.config())
    perturb(model)
    return model


def test_initial_adapter_equals_the_base_unless_asked_otherwise(case):
    if case.starts_as_base:
        untrained = get_peft_model(base_model(), case.config())
        assert_close(logits(case, untrained), logits(case, base_model()), rtol=0, atol=1e-5)
    moved = get_peft_model(base_model(), case.config(init_weights=False))
    assert (logits(case, moved) - logits(case, base_model())).abs().max() > 1e-3


def test_status_and_summary(case, capsys):
    model = adapted(case)
    status = get_model_status(model)
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.peft_types == {"default": case.adapter.upper()}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out


def test_a_second_adapter_loads_beside_the_first(case, tmp_path):
    model = adapted(case)
    expected = logits(case, model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(base_model(), case.config(init_weights=False))
    first = logits(case, other)
    other.load_adapter(tmp_path, adapter_name="loaded")
    assert torch.equal(logits(case, other), first)
    other.set_adapter("loaded")
    assert torch.equal(logits(case, other), expected)
    with pytest.raises(ValueError, match="nowhere"):
        other.set_adapter("nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        other.delete_adapter("nowhere")


def test_a_chosen_adapter_is_saved_in_its_own_folder(case, tmp_path):
    model = adapted(case)
    model.add_adapter("second", case.config(init_weights=False))
    model.set_adapter("second")
    expected = logits(case, model)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(logits(case, PeftModel.from_pretrained(base_model(), tmp_path / "second")), expected)


def test_state_dict_round_trip_into_another_model(case):
    model = adapted(case)
    other = get_peft_model(base_model(), case.config(init_weights=False))
    result = set_state(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(case, other), logits(case, model))


def test_inference_mode_freezes_and_training_mode_does_not(case, tmp_path):
    adapted(case).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(base_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    trainable = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    buffers = {name.replace(".default", "") for name, _ in trainable.named_buffers()}
    own = set(get_peft_model_state_dict(trainable)) - buffers
    assert sum(p.requires_grad for p in trainable.parameters()) == len(own) > 0


def test_switching_sets_which_tensors_train(case):
    model = adapted(case)
    model.add_adapter("second", case.config())
    for name in ("second", "default"):
        model.set_adapter(name)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(name in n.split(".")[-2:] for n in trained)


def test_base_weights_stay_untouched_by_training(case):
    model = adapted(case).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        if case.image_conditioned:
            scores = conditioned_logits(model, class_prompts(), image_features(model, pixels(3)))
        else:
            scores = model(**inputs(case, model)).logits_per_image
        scores.square().mean().backward()
        optimizer.step()
    assert len(before) > 10
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_modules_to_save_are_trained_and_stored(case, tmp_path):
    """Modules outside the method's own targets, by PEFT's mechanism."""
    model = get_peft_model(base_model(), case.config(modules_to_save=[case.saved_module]))
    perturb(model)
    expected = logits(case, model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(case, PeftModel.from_pretrained(base_model(), tmp_path)), expected)


def test_direct_injection_without_a_peft_model(case):
    model = inject_adapter_in_model(case.config(init_weights=False), base_model())
    assert type(model) is type(base_model())
    assert (logits(case, model) - logits(case, base_model())).abs().max() > 1e-3


def test_safe_merge_refuses_non_finite_tensors(case):
    """Or any merge, where the method adds tensors that no base weight can hold; the base weights stay as they were."""
    model = adapted(case)
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected" if case.can_merge else "cannot be merged"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(case, model.unload()), logits(case, base_model()))


def test_merging_two_adapters_is_refused(case):
    """A model left half merged would give wrong answers without a word."""
    model = adapted(case)
    model.add_adapter("second", case.config())
    expected = logits(case, model)
    with pytest.raises(AdapterError, match="one adapter to merge" if case.can_merge else "cannot be merged"):
        model.merge_adapter(["default", "second"])
    assert torch.equal(logits(case, model), expected)


def test_mixed_models_are_refused_by_name(case):
    with pytest.raises(ValueError, match=case.adapter.upper()):
        get_peft_model(base_model(), case.config(), mixed=True)


def test_get_features_run_through_the_adapter(case):
    model = adapted(case).eval()
    if case.image_conditioned:
        with pytest.raises(AdapterError, match="depend on the image"):
            model.get_text_features(input_ids=inputs(case, model)["input_ids"])
        return
    with torch.no_grad():
        text = model.get_text_features(input_ids=inputs(case, model).get("input_ids")).pooler_output
        image = model.get_image_features(pixel_values=pixels(3)).pooler_output
        normal = torch.nn.functional.normalize
        expected = model.get_base_model().logit_scale.exp() * normal(image, dim=-1) @ normal(text, dim=-1).T
    assert_close(logits(case, model), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spoil", ["missing", "unknown"])
def test_transformers_own_load_refuses_what_does_not_belong_together(case, spoil, tmp_path):
    """It printed a table, and went on with initial values."""
    adapted(case).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    if spoil == "missing":
        if len(tensors) == 1:  # a file without tensors is refused by its header
            return
        del tensors[sorted(tensors)[0]]
    else:
        tensors["base_model.model.extra.weight"] = torch.zeros(2)
    save_file(tensors, path, metadata={"format": "pt"})
    model = base_model()
    with pytest.raises(AdapterError, match="missing|unknown|by the configuration"):
        model.load_adapter(str(tmp_path))
    if hasattr(model, "peft_config"):
        assert "default" not in model.peft_config, "it was taken off again"
