"""An adapter knows the base model it was made on: what it is made of, and a digest of its weights."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import CLIPModel

from peft_vlm import CoOpConfig, SkipTuningConfig
from peft_vlm.adapters.config import base_digest
from peft_vlm.errors import AdapterError, PeftVLMWarning
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text.class_features import conditioned_logits, encode_classes
from peft_vlm.text.prompts import reserve_slots
from tests.cases import ADAPTER_CASES, Case, base_model, class_prompts
from tests.tiny import tiny_clip, tiny_siglip
from tests.tiny_questions import tiny_llava

FACTS = {
    ("text_config", "num_attention_heads"): 2,
    ("vision_config", "num_attention_heads"): 8,
    ("text_config", "hidden_act"): "gelu",
    ("vision_config", "hidden_act"): "gelu",
    ("vision_config", "patch_size"): 4,
    ("vision_config", "image_size"): 24,
    ("text_config", "vocab_size"): 600,
    ("text_config", "max_position_embeddings"): 50,
}


@pytest.fixture(scope="module", params=["coop", "skip_tuning"])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made on the tiny CLIP."""
    config = {"coop": CoOpConfig(), "skip_tuning": SkipTuningConfig(start_layer=2)}[request.param]
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_clip(), config).save_pretrained(folder)
    return folder


def rewritten(adapter: Path, folder: Path, **changes: object) -> Path:
    """A copy of an adapter with other values in its configuration; None takes an entry out."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("part", "key"), FACTS)
def test_a_base_model_of_another_structure_is_refused(adapter: Path, part: str, key: str) -> None:
    """With other heads or another activation all shapes fit, and every output would be wrong."""
    config = tiny_clip().config
    setattr(getattr(config, part), key, FACTS[part, key])
    name = f"{part.partition('_')[0]}_{key}"
    with pytest.raises(AdapterError, match=f"made for another base model .*{name}: adapter .*, this model "):
        PeftModel.from_pretrained(CLIPModel(config), adapter)


def test_adapters_that_record_less_still_load(adapter: Path, tmp_path: Path) -> None:
    """Those of earlier releases have sizes alone, and no digest."""
    recorded = json.loads((adapter / "adapter_config.json").read_text())["base_architecture"]
    assert {f"{part.partition('_')[0]}_{key}" for part, key in FACTS} < set(recorded)
    sizes = {key: recorded[key] for key in ("model_type", "text_hidden_size", "vision_num_hidden_layers")}
    old = rewritten(adapter, tmp_path / "old", base_architecture=sizes, base_digest=None)
    model = PeftModel.from_pretrained(tiny_clip(seed=5), old)
    assert model.active_peft_config.base_digest is None, "nobody knows on which weights it was made"


def test_a_base_model_with_other_weights_gives_a_warning(adapter: Path) -> None:
    """Another checkpoint of the same architecture loads without any other sign."""
    with pytest.warns(PeftVLMWarning, match=r"made on other weights of the base model \(digest float32/\d+/"):
        model = PeftModel.from_pretrained(tiny_clip(seed=5), adapter)
    assert model.active_peft_config.base_digest == base_digest(tiny_clip()), "what was recorded stays"


def test_a_second_adapter_of_another_base_model_gives_a_warning(tmp_path: Path) -> None:
    """The base model is wrapped by then, so that its digest is the one of the first adapter."""
    for seed in (0, 5):
        get_peft_model(tiny_clip(seed=seed), CoOpConfig()).save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(tiny_clip(), tmp_path / "0")
    model.load_adapter(tmp_path / "0", "same")
    with pytest.warns(PeftVLMWarning, match="made on other weights"):
        model.load_adapter(tmp_path / "5", "other")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_weights_in_another_precision_give_no_warning(adapter: Path, dtype: torch.dtype) -> None:
    """Rounded values have another digest, which says nothing; every warning is an error in this test."""
    PeftModel.from_pretrained(tiny_clip().to(dtype), adapter)


def test_a_digest_shows_a_change_of_any_matrix() -> None:
    """A fine-tuning of one projection is another base model."""
    before, names = base_digest(tiny_siglip()), []
    for name, _ in tiny_siglip().named_parameters():
        model = tiny_siglip()
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.mul_(1.01)
        if parameter.ndim > 1:
            names.append(name)
            assert base_digest(model) != before, name
    assert len(names) > 20


def test_without_values_there_is_no_digest() -> None:
    """A digest of nothing would differ from every other."""
    with torch.device("meta"):
        assert base_digest(CLIPModel(tiny_clip().config)) is None


def empty_clip() -> CLIPModel:
    """A CLIP without values."""
    with torch.device("meta"):
        return CLIPModel(tiny_clip().config)


@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda case: case.method)
def test_a_model_without_weights_gets_no_adapter(case: Case, tmp_path: Path) -> None:
    """Copies of nothing are nothing: the adapter would train, and be saved, as an empty one."""
    message = r"a model with weights, got \d+ of its tensors on `meta`, where nothing fills them: '"
    with pytest.raises(AdapterError, match=message):
        get_peft_model(empty_clip(), case.config())
    get_peft_model(base_model(), case.config()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(empty_clip(), tmp_path)
    model = base_model()
    model.vision_model.post_layernorm.to("meta")
    with pytest.raises(AdapterError, match="got 2 of its tensors on `meta`.*'vision_model.post_layernorm.weight'"):
        get_peft_model(model, case.config())


def offloaded(model: torch.nn.Module, how: str, folder: Path) -> torch.nn.Module:
    """The model with its weights elsewhere between two calls, as accelerate leaves it."""
    if how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, torch.device("cpu"), offload_buffers=how == "memory and buffers")
    return model


def outputs(model: torch.nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """Class features and logits, with the adapter and without."""
    prompts, pixels = class_prompts(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = {}
    with torch.no_grad():
        if case.image_conditioned:
            found["scores"] = conditioned_logits(model, prompts, image_features(model, pixels))
        else:
            found["features"] = features = encode_classes(model, prompts)
            found["scores"] = towers_of(model).similarity_logits(image_features(model, pixels), features)
        if not case.text_free and not case.image_conditioned:
            ids = reserve_slots(model, prompts).input_ids
            found["logits"] = model(input_ids=ids, pixel_values=pixels).logits_per_image
        with model.disable_adapter():
            found["base"] = model(input_ids=prompts.input_ids, pixel_values=pixels).logits_per_image
    return found


@pytest.mark.parametrize("how", ["memory and buffers", "disk"])
@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda case: case.method)
def test_an_offloaded_model_gets_the_adapter_that_the_model_in_memory_gets(
    case: Case, how: str, tmp_path: Path
) -> None:
    """Between two calls its weights are on `meta`: an adapter that is copied from there, or lies there, is empty."""
    found = []
    for model in (base_model(), offloaded(base_model(), how, tmp_path / "weights")):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, case.config(init_weights=False)).eval()
        tensors = get_peft_model_state_dict(wrapped)
        wrapped.save_pretrained(tmp_path / str(len(found)))
        found.append(({name: tensor.clone() for name, tensor in tensors.items()}, outputs(wrapped, case)))
    loaded = PeftModel.from_pretrained(offloaded(base_model(), how, tmp_path / "again"), tmp_path / "0").eval()
    found.append((get_peft_model_state_dict(loaded), outputs(loaded, case)))
    for tensors, values in found[1:]:
        assert tensors.keys() == found[0][0].keys()
        assert not any(tensor.is_meta for tensor in tensors.values())
        assert all(torch.equal(tensor, found[0][0][name]) for name, tensor in tensors.items())
        assert all(torch.equal(value, found[0][1][name]) for name, value in values.items())


@pytest.mark.parametrize("how", ["memory", "parts"])
def test_an_offloaded_multimodal_model_answers_as_the_one_in_memory(how: str, tmp_path: Path) -> None:
    """The large ones are those that are offloaded, often in part."""
    ids, found = torch.tensor([[1, 3, 4, 5]]), []
    for is_offloaded in (False, True):
        model = tiny_llava()
        if is_offloaded and how == "memory":
            cpu_offload(model, torch.device("cpu"))
        elif is_offloaded:
            places = {
                "model.vision_tower": "cpu",
                "model.multi_modal_projector": "disk",
                "model.language_model": "disk",
            }
            dispatch_model(model, places | {"lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path))
        torch.manual_seed(0)
        wrapped = get_peft_model(model, SkipTuningConfig(start_layer=1, init_weights=False)).eval()
        with torch.no_grad():
            found.append(wrapped(input_ids=ids).logits)
    assert torch.equal(*found)
