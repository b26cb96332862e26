"""CoCoOp's shift by hand, flat memory, classifying image by image, what it refuses."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from peft_vlm import CoCoOpConfig, CoOpConfig, PromptedClassifier
from peft_vlm.data.dataset import collate
from peft_vlm.errors import AdapterError
from peft_vlm.evaluation.classify import TextClassifier, evaluate_classifier
from peft_vlm.methods.cocoop import preset_for
from peft_vlm.models import packed_texts
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import ClassFeatureCache, class_features, conditioned_logits, encode_classes, tokenize_classes
from tests.cases import CASES as ALL_CASES
from tests.cases import class_prompts, images, kept_for_backward, perturb, pixels, prepared, processor
from tests.tiny import CONTEXT_LENGTH, colour_names, tiny_clip, tiny_tokenizer

(CASE,) = [case for case in ALL_CASES if case.method == "cocoop"]


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), CASE.config(**settings))
    perturb(model)
    return model.eval()


@torch.no_grad()
def test_an_image_is_classified_by_a_coop_context_that_is_shifted_by_it():
    """By hand: h = W2 relu(W1 x / |x| + b1) + b2 is added to every vector of a CoOp context."""
    model = adapted()
    layer = towers_of(model).token_embedding
    names = ("prompt", "weight1", "bias1", "weight2", "bias2")
    parts = {name: getattr(layer, f"cocoop_{name}")["default"] for name in names}
    features = image_features(model, pixels())
    actual = conditioned_logits(model, class_prompts(), features)
    plain = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2)).eval()
    for row, feature in zip(actual, features, strict=True):
        hidden = (parts["weight1"] @ (feature / feature.norm()) + parts["bias1"]).relu()
        shift = parts["weight2"] @ hidden + parts["bias2"]
        towers_of(plain).token_embedding.coop_prompt["default"].copy_(parts["prompt"] + shift)
        expected = towers_of(plain).similarity_logits(feature[None], encode_classes(plain, class_prompts()))
        assert_close(row, expected[0], rtol=1e-5, atol=1e-4)


def test_a_network_of_zeros_is_coop():
    model = adapted()
    layer = towers_of(model).token_embedding
    with torch.no_grad():
        layer.cocoop_weight2["default"].zero_()
        layer.cocoop_bias2["default"].zero_()
        logits = conditioned_logits(model, class_prompts(), image_features(model, pixels()))
        plain = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2)).eval()
        towers_of(plain).token_embedding.coop_prompt["default"].copy_(layer.cocoop_prompt["default"])
        features = encode_classes(plain, class_prompts())
        expected = towers_of(plain).similarity_logits(image_features(plain, pixels()), features)
    assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_the_backward_pass_keeps_one_text_pass_whatever_the_batch():
    """What autograd keeps per image would be a text tower's activations for every class."""
    model, dataset = adapted().train(), images()
    objective = prepared(CASE, model, dataset)
    batches = [collate([dataset[i] for i in range(count)]) for count in (2, 8)]
    kept = [kept_for_backward(lambda batch=batch: objective(model, batch).loss) for batch in batches]
    features = 4 * 6 * 16 * 8  # bytes of the class features of an image, a few times
    assert kept[1] - kept[0] < 6 * features


def test_chunks_of_classes_and_shared_beginnings_change_nothing():
    model = adapted()
    before = packed_texts.passes["packed"]
    with torch.no_grad():
        features = image_features(model, pixels())
        whole = conditioned_logits(model, class_prompts(), features)
        assert packed_texts.passes["packed"] > before
        parts = conditioned_logits(model, class_prompts(), features, chunk_size=2)
    assert_close(parts, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("masked", [0, 2048])
def test_images_that_run_together_have_the_logits_and_gradients_of_single_ones(masked, monkeypatch):
    """As on a GPU: a context in the prompts of another image would leave the loss plausible."""
    model = adapted().train()
    features = image_features(model, pixels()).detach()
    results = []
    for together in (1, 3):  # of four images: three and one
        monkeypatch.setattr(class_features, "_shifts_per_pass", lambda *_, together=together: together)
        monkeypatch.setitem(packed_texts.LONGEST_MASKED, "cpu", masked)
        model.zero_grad()
        logits = conditioned_logits(model, class_prompts(), features)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 6
    for alone, joint in zip(*results, strict=True):
        assert alone.abs().max() > 0
        assert_close(joint, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_several_templates_are_averaged():
    model = adapted()
    both = tokenize_classes(tiny_tokenizer(), colour_names(), template=["a {}.", "{}!"], max_length=CONTEXT_LENGTH)
    with torch.no_grad():
        logits = conditioned_logits(model, both, image_features(model, pixels()))
    assert logits.shape == (4, 6)
    assert torch.isfinite(logits).all()


def test_classifiers_take_the_image_into_their_prompts():
    """With class features of one image every other image would be classified by that one's prompts."""
    model, tools = adapted(), processor()
    classifier = PromptedClassifier(
        model, tools.tokenizer, tools.image_processor, class_names=colour_names(), template="a {}."
    )
    pictures = [images(per_class=1).image(i) for i in range(3)]
    pixel_values = tools.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = conditioned_logits(model, class_prompts(), image_features(model, pixel_values))
    logits = TextClassifier(model, tools.tokenizer, template="a {}.").logits_for(colour_names())(pixel_values)
    assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    data = images(per_class=1)
    result = evaluate_classifier(model, data, class_prompts())
    with torch.no_grad():
        every = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
        own = conditioned_logits(model, class_prompts(), image_features(model, every))
    assert torch.equal(result.predicted, own.argmax(dim=-1))
    for row, predictions in zip(expected.softmax(-1), classifier.predict(pictures), strict=True):
        assert predictions[0].label == colour_names()[int(row.argmax())]
        assert predictions[0].probability == pytest.approx(float(row.max()), rel=1e-3)


def test_class_features_without_an_image_are_refused():
    """They would be those of some earlier image, or of none."""
    model = adapted()
    with pytest.raises(AdapterError, match="depend on the image"):
        encode_classes(model, class_prompts())
    with pytest.raises(AdapterError, match="depend on the image"):
        ClassFeatureCache().get(model, class_prompts())
    with model.disable_adapter():
        assert encode_classes(model, class_prompts()).shape == (6, 16)
        with pytest.raises(AdapterError, match="got none"):
            conditioned_logits(model, class_prompts(), torch.ones(1, 16))


def test_the_preset_and_the_words(tmp_path):
    preset = preset_for()
    assert preset.config == {"num_text_tokens": 4, "context_init": "a photo of a"}
    assert preset.training["per_device_train_batch_size"] == 1
    assert CoCoOpConfig(**preset.config).num_text_tokens == 4
    model = get_peft_model(tiny_clip(), CASE.config(context_init_ids=[5, 6, 7]))
    assert model.active_peft_config.num_text_tokens == 3
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_clip(), tmp_path).active_peft_config.num_text_tokens == 3
