"""PromptSRC's terms by hand, its frozen features, what it refuses, and its use with other parts of the package."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.testing import assert_close
from transformers import pipeline

from peft_vlm import PromptedClassifier, PromptSRCConfig, PromptSRCObjective
from peft_vlm.data.dataset import collate
from peft_vlm.losses import feature_distance
from peft_vlm.methods.promptsrc import OFFICIAL_TEMPLATES
from peft_vlm.text import encode_classes, reserve_slots, tokenize_classes
from tests.cases import CASES as ALL_CASES
from tests.cases import NUM_CLASSES, augmented, class_prompts, images, perturb, pixels, prepared, processor
from tests.tiny import CONTEXT_LENGTH, tiny_clip, tiny_tokenizer

(CASE,) = [case for case in ALL_CASES if case.method == "promptsrc"]
INDICES = (0, 7, 14, 21)


def fresh(**settings):
    torch.manual_seed(5)
    model = get_peft_model(tiny_clip(), CASE.config(**settings))
    perturb(model)
    return model


def terms_of(model, dataset, **settings) -> dict[str, float]:
    objective = prepared(CASE, model, dataset, **settings)
    output = objective(model, collate([dataset[i] for i in INDICES]))
    return {name: float(term.detach()) for name, term in output.loss_terms.items()}


def test_feature_distance_by_hand():
    """(3, 4) and (0, 2) have the directions (0.6, 0.8) and (0, 1): mean of 0.6, 0.2, 0 and 0."""
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert float(feature_distance(features, torch.tensor([[0.0, 2.0], [5.0, 0.0]]))) == pytest.approx(0.2)


def test_terms_by_hand():
    """From features of the plain Hugging Face forward, once with the adapter and once without."""
    model, dataset = fresh(), images()
    names = class_prompts().class_names
    frozen = tokenize_classes(tiny_tokenizer(), names, template=["a {}.", "the {}!"], max_length=CONTEXT_LENGTH)
    batch = collate([dataset[i] for i in INDICES])
    terms = terms_of(model, dataset, frozen_prompts=frozen)
    normal = torch.nn.functional.normalize
    with torch.no_grad():
        text = normal(model.get_text_features(reserve_slots(model, class_prompts()).input_ids).pooler_output, dim=-1)
        image = normal(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
        base = tiny_clip()
        raw = base.get_text_features(frozen.input_ids).pooler_output
        fixed = normal((raw[:NUM_CLASSES] + raw[NUM_CLASSES:]) / 2, dim=-1)
        zero_shot = normal(base.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
        scale = base.logit_scale.exp()
        p, q = ((scale * a @ b.T).softmax(dim=-1) for a, b in ((zero_shot, fixed), (image, text)))
    right = q[range(4), batch["labels"]].log()
    assert terms["cross_entropy"] == pytest.approx(-float(right.mean()), rel=1e-4)
    assert terms["text_consistency"] == pytest.approx(25 * float((text - fixed).abs().mean()), rel=1e-4)
    assert terms["image_consistency"] == pytest.approx(10 * float((image - zero_shot).abs().mean()), rel=1e-4)
    divergence = float((p * (p / q).log()).sum() / p.numel())
    assert terms["logit_consistency"] == pytest.approx(divergence, rel=1e-3)


def test_weights_scale_their_terms_and_zero_leaves_them_out():
    model, dataset = fresh(), images()
    one = terms_of(model, dataset, text_weight=1, image_weight=1, logit_weight=1)
    three = terms_of(model, dataset, text_weight=3, image_weight=4, logit_weight=5)
    assert [three[f"{n}_consistency"] / one[f"{n}_consistency"] for n in ("text", "image", "logit")] == pytest.approx(
        [3, 4, 5], rel=1e-4
    )
    assert list(terms_of(model, dataset, text_weight=0, image_weight=0, logit_weight=0)) == ["cross_entropy"]
    assert list(terms_of(model, dataset, image_weight=0, logit_weight=0)) == ["cross_entropy", "text_consistency"]


def calls_of(model, path: str) -> list[bool]:
    """Whether each pass through a layer carries gradients."""
    calls: list[bool] = []
    layer = model.get_base_model().get_submodule(path)
    layer.register_forward_hook(lambda _, args, output: calls.append(output.requires_grad))
    return calls


def test_without_consistency_the_frozen_model_never_runs():
    """IVLP pays for nothing that it does not use."""
    model, dataset = fresh(), images()
    vision, text = calls_of(model, "vision_model.encoder.layers.0"), calls_of(model, "text_model.encoder.layers.0")
    terms_of(model, dataset, text_weight=0, image_weight=0, logit_weight=0)
    assert vision == text == [True]


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("image_cache", ["auto", "none"])
def test_frozen_image_features_are_computed_once_where_pixels_stay(random, image_cache):
    """The frozen pass of a batch runs without autograd; with fixed pixels it is not repeated at all."""
    model, dataset = fresh(), augmented() if random else images()
    objective = prepared(CASE, model, dataset, image_cache=image_cache)
    calls = calls_of(model, "vision_model.encoder.layers.0")
    for _ in range(2):
        objective(model, collate([dataset[i] for i in INDICES]))
    stored = image_cache == "auto" and not random
    assert calls == [True, True] if stored else [False, True, False, True]


def test_stored_frozen_features_change_nothing():
    model, dataset = fresh(), images()
    assert terms_of(model, dataset, image_cache="auto") == pytest.approx(
        terms_of(model, dataset, image_cache="none"), rel=1e-5
    )


def test_the_frozen_pass_leaves_the_adapter_trainable():
    """PEFT switches gradients off with the adapter; left off, nothing would learn and nothing would say so."""
    model, dataset = fresh(), augmented()
    objective = prepared(CASE, model, dataset)
    objective(model.train(), collate([dataset[i] for i in INDICES])).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(get_peft_model_state_dict(model)) == 5
    assert all(p.grad is not None for p in trained)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "vision", "text"),
    [({"num_vision_tokens": 0}, [False], [True]), ({"num_text_tokens": 0}, [True], [])],
)
def test_a_tower_without_prompts_runs_without_autograd(settings, vision, text):
    """Text only (CoOp-like): no vision gradients. Vision only (VPT): class features are computed once per run."""
    model, dataset = fresh(**settings), augmented()
    weights = {"text_weight": 0, "image_weight": 0, "logit_weight": 0}
    objective = prepared(CASE, model, dataset, **weights)
    vision_calls = calls_of(model, "vision_model.encoder.layers.0")
    text_calls = calls_of(model, "text_model.encoder.layers.0")
    output = objective(model, collate([dataset[i] for i in INDICES]))
    assert (vision_calls, text_calls) == (vision, text)
    ids = reserve_slots(model, class_prompts()).input_ids
    with torch.no_grad():
        batch = collate([dataset[i] for i in INDICES])
        logits = model(pixel_values=batch["pixel_values"], input_ids=ids).logits_per_image
    assert_close(output.logits.detach(), logits, rtol=1e-5, atol=1e-4)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_text_is_cut_to_its_real_length():
    model, dataset = fresh(), images()
    objective = prepared(CASE, model, dataset)
    lengths: list[int] = []
    layer = model.get_base_model().text_model.encoder.layers[0]
    layer.register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
    objective(model, collate([dataset[0]]))
    assert lengths == [1 + 2 + 1 + 6 + 1 + 1]  # start, context, "a", "orange", ".", end: of 40 positions


def test_the_official_templates_are_sixty_different_ones():
    assert len(set(OFFICIAL_TEMPLATES)) == len(OFFICIAL_TEMPLATES) == 60
    assert all(template.count("{}") == 1 for template in OFFICIAL_TEMPLATES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_weight": -1}, "`text_weight` of 0 or more, got -1"),
        ({"gpa_mean": 3}, "both `gpa_mean` and `gpa_std` > 0, or neither, got 3 and None"),
        ({"gpa_mean": 3, "gpa_std": 0}, "`gpa_std` above 0, got 0"),
        ({"image_cache": "ram"}, r"\('auto', 'none'\), got 'ram'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptSRCObjective(class_prompts(), **settings)


def test_prompts_that_do_not_fit_are_refused():
    ensemble = tokenize_classes(tiny_tokenizer(), ["a", "b"], template=["{}", "the {}"], max_length=CONTEXT_LENGTH)
    with pytest.raises(ValueError, match="one template, got 2.*`frozen_prompts`"):
        PromptSRCObjective(ensemble)
    with pytest.raises(ValueError, match="the 6 classes of `prompts`, in their order, got 2"):
        PromptSRCObjective(class_prompts(), frozen_prompts=ensemble)
    with pytest.raises(RuntimeError, match="Expected `prepare"):
        PromptSRCObjective(class_prompts())(fresh(), collate([images()[0]]))
    with pytest.raises(ValueError, match="has no state"):
        PromptSRCObjective(class_prompts()).load_state_dict({"aggregated_epochs": torch.tensor(1)})


def test_adapters_of_other_depths_and_token_counts_live_side_by_side():
    model = fresh().eval()
    model.add_adapter("small", PromptSRCConfig(num_text_tokens=5, text_depth=1, vision_depth=0, context_init=None))
    model.add_adapter("vision", PromptSRCConfig(num_text_tokens=0, num_vision_tokens=1, vision_depth=3))
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("default", "small", "vision", "default"):
        model.set_adapter(name)
        with torch.no_grad():
            ids = reserve_slots(model, class_prompts()).input_ids
            seen.setdefault(name, []).append(model(pixel_values=pixels(), input_ids=ids).logits_per_image)
    assert torch.equal(*seen["default"])
    assert len({tuple(logits[0].flatten().tolist()) for logits in seen.values()}) == 3
    with torch.no_grad(), model.disable_adapter():
        plain = model(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
        assert torch.equal(
            plain, tiny_clip()(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
        )


def test_new_class_names_and_the_zero_shot_pipeline():
    """Both get the slots: the classifier by itself, the pipeline by its template."""
    model, tools = fresh().eval(), processor()
    names = ["a new one", "red", "blue"]
    picture = images().image(0)
    classifier = PromptedClassifier(model, tools.tokenizer, tools.image_processor, template="a {}.")
    predictions = classifier.predict(picture, class_names=names)
    features = encode_classes(
        model, tokenize_classes(tools.tokenizer, names, template="a {}.", max_length=CONTEXT_LENGTH)
    )
    assert features.shape == (3, 16)
    classify = pipeline(
        "zero-shot-image-classification",
        model=model.get_base_model(),
        tokenizer=tools.tokenizer,
        image_processor=tools.image_processor,
    )
    template = "<|startoftext|><|startoftext|>a {}."
    scores = {row["label"]: row["score"] for row in classify(picture, names, hypothesis_template=template)}
    assert {p.label: p.probability for p in predictions} == pytest.approx(scores, rel=1e-4)
