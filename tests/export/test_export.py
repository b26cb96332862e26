"""An exported classifier gives the logits of its adapter, as a plain module, a torch program and an ONNX file."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_vlm import SkipTuningConfig
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import AdapterError, ClassNameError, DataError, PeftVLMError, UnsupportedModelError
from peft_vlm.export import classifier as module
from peft_vlm.export import export_classifier, plain_classifier, save_onnx, save_program, write_export
from peft_vlm.export.classifier import preprocessing_of
from peft_vlm.serving.onnx import OnnxClassifier
from peft_vlm.serving.plain import load_exported
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import tokenize_for_model
from tests.cases import ADAPTER_CASES, Case, base_model, class_prompts, logits_of, perturb, pixels, tvp_config
from tests.tiny import clip_processor, colour_names, noise_image, siglip_processor, tiny_siglip, tiny_tokenizer

#: Of a logit; float32 kernels of torch and onnxruntime add in other orders. Observed: up to 4e-6.
TOLERANCE = 1e-4


def adapted(config, *, model=None) -> nn.Module:
    """A tiny model whose adapter acts."""
    model = get_peft_model(base_model() if model is None else model, config)
    perturb(model)
    return model.eval()


def exported(model: nn.Module, processor=None):
    """Its export over the colour classes."""
    features = encode_classes(model, class_prompts())
    return plain_classifier(model, features, colour_names(), image_processor=processor or clip_processor())


#: A case that is a plain classifier for fixed classes.
EXPORTABLE = next(case for case in ADAPTER_CASES if case.adapter == "promptsrc")


@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda case: case.adapter)
def test_every_format_gives_the_logits_of_the_adapter(case: Case, tmp_path) -> None:
    """For batches of one and of three: a dynamic axis that was traced as a constant shows here."""
    model = adapted(case.config())
    if case.image_conditioned:
        with pytest.raises(
            AdapterError, match="no class features without one.*can be exported|one set of class features"
        ):
            exported(model)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classifier = exported(model)
    save_onnx(classifier, tmp_path / "classifier.onnx")
    save_program(classifier, tmp_path / "classifier.pt2")
    onnx = OnnxClassifier(tmp_path / "classifier.onnx", threads=1)
    runners = {
        "plain": classifier,
        "program": torch.export.load(tmp_path / "classifier.pt2").module(),
        "onnx": lambda images: torch.from_numpy(onnx(images.numpy())),
    }
    for count in (1, 3):
        expected = logits_of(case, model, pixels(count))
        for name, run in runners.items():
            torch.testing.assert_close(run(pixels(count)), expected, atol=TOLERANCE, rtol=0, msg=f"{name}, {count}")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    modules = {type(module).__module__.partition(".")[0] for module in classifier.modules()}
    assert modules == {"torch", "peft_vlm"}
    assert {type(m).__module__ for m in classifier.modules() if type(m).__module__.startswith("peft_vlm")} <= {
        "peft_vlm.serving.plain",
        "peft_vlm.serving.tower",
    }


def test_siglip_is_exported_with_its_pooling_and_bias(tmp_path) -> None:
    """Attention pooling, no class token, a logit bias."""
    model = adapted(SkipTuningConfig(start_layer=1), model=tiny_siglip())
    prompts = tokenize_for_model(model, tiny_tokenizer(), colour_names(), template="a {}.")
    features = encode_classes(model, prompts)
    classifier = plain_classifier(model, features, colour_names(), image_processor=siglip_processor())
    images = pixels(3)
    expected = model(pixel_values=images, input_ids=prompts.input_ids).logits_per_image
    torch.testing.assert_close(classifier(images), expected, atol=TOLERANCE, rtol=0)
    save_onnx(classifier, tmp_path / "classifier.onnx")
    onnx = OnnxClassifier(tmp_path / "classifier.onnx", threads=1)
    torch.testing.assert_close(torch.from_numpy(onnx(images.numpy())), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"shrink": "none", "canvas_size": 24, "border": 4},
        {"clamp": True},
        {"clamp": True, "shrink": "none"},
        {"shape": "patch", "patch_size": 5, "border": 2},
        {"shape": "full", "border": 0, "shrink": "none"},
    ],
)
def test_pixel_prompts_of_every_kind_are_exported(settings) -> None:
    """The shrinking is a pair of matrices in the export, an interpolation in the adapter."""
    model = adapted(tvp_config(**settings))
    case = next(case for case in ADAPTER_CASES if case.adapter == "tvp")
    torch.testing.assert_close(exported(model)(pixels()), logits_of(case, model), atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore:Left out query prompts:peft_vlm.errors.PeftVLMWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"share_qkv": "all", "vision_depth": 1},
        {"slot_residual": "replaced", "dead_prompts": "omit"},
        {"slot_residual": "replaced", "share_qkv": "all"},
        {"vision_depth": 3, "dead_prompts": "omit"},
    ],
)
def test_prompts_of_the_attention_become_constants(settings) -> None:
    """Queries, keys and values of the slots, and what the slots carry past the attention."""
    case = next(case for case in ADAPTER_CASES if case.adapter == "rpp")
    model = adapted(case.config(**settings))
    torch.testing.assert_close(exported(model)(pixels()), logits_of(case, model), atol=TOLERANCE, rtol=0)


def test_the_active_adapter_is_exported() -> None:
    """With two adapters on one model, and with none switched on."""
    case = next(case for case in ADAPTER_CASES if case.adapter == "promptsrc")
    model = adapted(case.config())
    first = exported(model)(pixels())
    model.add_adapter("other", case.config(**case.other_shape))
    model.set_adapter("other")
    other = exported(model)(pixels())
    torch.testing.assert_close(other, logits_of(case, model), atol=TOLERANCE, rtol=0)
    assert not torch.allclose(first, other, atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(exported(model)(pixels()), logits_of(case, model), atol=TOLERANCE, rtol=0)


def test_half_precision_keeps_its_type() -> None:
    """A bfloat16 model exports as one; its logits come in float32."""
    model = adapted(EXPORTABLE.config(), model=base_model().to(torch.bfloat16))
    classifier = exported(model)
    assert classifier.tower.positions.dtype == torch.bfloat16
    assert classifier(pixels().bfloat16()).dtype == torch.float32


def test_files_carry_classes_and_preprocessing(tmp_path) -> None:
    """One file is enough; tensors come back bit for bit."""
    classifier = exported(adapted(EXPORTABLE.config()))
    names = [path.name for path in write_export(classifier, tmp_path / "new", ["safetensors"])]
    assert names == ["classifier.safetensors", "classifier.json"]
    loaded = load_exported(tmp_path / "new" / "classifier.safetensors")
    assert loaded.card == classifier.card
    assert loaded.card.class_names == tuple(colour_names())
    assert torch.equal(loaded(pixels()), classifier(pixels()))
    with pytest.raises(PeftVLMError, match="got \\['tflite'\\]"):
        write_export(classifier, tmp_path, ["tflite"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.vision_model.encoder.layers[0].register_forward_hook(lambda *a: 2 * a[2]), "differs from"),
        (lambda m: m.vision_model.post_layernorm.weight.data.fill_(float("nan")), "differs from `CLIPModel` by nan"),
        (lambda m: setattr(m.config.vision_config, "hidden_act", "relu"), "got 'relu'"),
    ],
)
def test_what_an_export_cannot_see_is_an_error(change, message) -> None:
    """A model that computes something else than its sizes say must not be exported as if nothing were."""
    model = base_model()
    change(model)
    with pytest.raises(PeftVLMError, match=message):
        exported(model)


def test_foreign_adapters_and_shrinking_processors_are_refused() -> None:
    """LoRA can be merged first; a processor outside the model cannot come along."""
    lora = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        exported(lora)
    assert exported(lora.merge_and_unload()) is not None
    with pytest.raises(UnsupportedModelError, match="shrink='processor'"):
        exported(adapted(tvp_config(shrink="processor")))


def test_missing_parts_are_named(monkeypatch, tmp_path) -> None:
    """No class names; no onnx; a processor whose work the card cannot say."""
    base = tmp_path / "base"
    base_model().save_pretrained(base)
    clip_processor().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(ClassNameError, match="Pass `class_names=`"):
        export_classifier(None, base_model=base)
    with pytest.raises(AdapterError, match="neither"):
        export_classifier(None)
    classifier = export_classifier(None, base_model=base, class_names=["red", "blue"])
    assert classifier.card.source["base_model"] == str(base)
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else SimpleNamespace())
    with pytest.raises(PeftVLMError, match=r"needs onnxscript. Install: pip install onnx onnxscript"):
        save_onnx(classifier, tmp_path / "x.onnx")
    processor = clip_processor()
    processor.do_resize = False
    with pytest.raises(DataError, match="do_resize=False"):
        preprocessing_of(processor)


def test_preprocessing_is_that_of_the_image_processor() -> None:
    """Same pixels for wide, tall, tiny and large images; see `tests/serving` for modes and orientation."""
    for processor in (clip_processor(), siglip_processor()):
        ours, theirs = preprocessing_of(processor), EvalTransform(processor)
        for width, height in ((16, 16), (40, 17), (19, 33), (5, 9), (16, 50)):
            image = noise_image(width, height)
            torch.testing.assert_close(torch.from_numpy(ours(image)), theirs(image), atol=1e-6, rtol=0)
