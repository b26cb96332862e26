"""TVP's objective: the language loss, both sides of FCA and its caches, the CLIP of TSE, further source models."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from peft_vlm import TVPConfig
from peft_vlm.data import ImageQuestionDataset, QuestionCollator, RandomCrop, model_inputs
from peft_vlm.data.shrink import ShrinkingProcessor
from peft_vlm.errors import AdapterError, DataError
from peft_vlm.evaluation import evaluate_prompt
from peft_vlm.methods.tvp import TVPObjective, prompt_layer_of, prompt_of, without_prompt
from peft_vlm.models.towers import image_features
from peft_vlm.models.vision import encode_visual_tokens
from peft_vlm.text import encode_classes, tokenize_classes
from tests.cases import class_prompts, images
from tests.methods.tvp_models import (
    batch,
    gradient,
    guide,
    objective,
    prepared,
    prompt_parameter,
    prompted_llava,
    questions,
    second_model,
)
from tests.tiny import clip_processor, colour_names, noise_image, tiny_clip, tiny_siglip, tiny_tokenizer
from tests.tiny_questions import llava_processor


def test_the_language_term_is_the_models_own_loss_on_the_answer():
    """Mean over all answer tokens of the batch, and logits for those alone."""
    model, columns = prompted_llava(), batch(questions())
    output = prepared(model, questions(), fca_weight=0, tse_weight=0)(model, columns)
    told = columns["token_labels"][columns["token_labels"] != -100]
    expected = model(**model_inputs(columns), labels=columns["token_labels"])
    assert list(output.loss_terms) == ["language"]
    assert_close(output.loss, expected.loss)
    assert output.logits.shape == (len(told), expected.logits.shape[-1])
    assert torch.equal(output.labels, told)
    assert_close(gradient(model, objective(fca_weight=0, tse_weight=0), columns), _gradient_of(model, columns))


def _gradient_of(model: PeftModel, columns: dict[str, Tensor]) -> Tensor:
    prompt_parameter(model).grad = None
    model(**model_inputs(columns), labels=columns["token_labels"]).loss.backward()
    return prompt_parameter(model).grad


def test_terms_by_hand():
    """Each from its definition, by separate passes: prompted and clean tokens, CLIP features and captions."""
    model, columns = prompted_llava(), batch(questions())
    target = prepared(model, questions(), fca_weight=0.5, tse_weight=0.25)
    terms = target(model, columns).loss_terms
    with torch.no_grad():
        prompted = model.get_base_model().get_image_features(columns["pixel_values"]).pooler_output
        with without_prompt(model):
            clean = model.get_base_model().get_image_features(columns["pixel_values"]).pooler_output
        fca = torch.stack([(p - c).norm(dim=-1) for p, c in zip(prompted, clean, strict=True)]).mean()
        clip = tiny_clip(seed=7)
        text = encode_classes(clip, class_prompts())
        adapted = get_peft_model(clip, TVPConfig.for_processor(clip_processor(16), canvas_size=32, border=5))
        prompt_parameter(adapted).copy_(prompt_of(model))
        features = nn.functional.normalize(image_features(adapted, columns["clip_pixel_values"]), dim=-1)
        cosines = (features * text[columns["labels"]]).sum(dim=-1)
        tse = clip.logit_scale.exp() * cosines.mean()
    assert fca > 0.1
    assert_close(terms["fca"], 0.5 * fca)
    assert_close(terms["tse"], -0.25 * tse)


@pytest.mark.parametrize("weights", [{"fca_weight": 0}, {"tse_weight": 0}, {"fca_weight": 0, "tse_weight": 0}])
def test_a_term_without_weight_is_not_there(weights: dict[str, int]):
    model, dataset = prompted_llava(), questions()
    terms = prepared(model, dataset, **weights)(model, batch(dataset)).loss_terms
    names = {"fca_weight": "fca", "tse_weight": "tse"}
    assert set(terms) == {"language", "fca", "tse"} - {names[weight] for weight in weights}


def test_the_clean_side_is_of_the_same_crop():
    """Tokens of another crop would pull the prompt towards undoing the crop."""
    dataset = questions(2, augmentation=RandomCrop())
    model = prompted_llava()
    target = prepared(model, dataset)
    dataset.set_epoch(1)
    columns = batch(dataset)
    with torch.no_grad(), without_prompt(model):
        clean = encode_visual_tokens(model, columns)
    prompted = encode_visual_tokens(model, columns)
    assert_close(target(model, columns).loss_terms["fca"], 0.05 * (prompted - clean).norm(dim=-1).mean())


def test_dropout_of_the_frozen_model_is_off():
    """The trainer switches the whole model to training mode before each step."""
    model, dataset = prompted_llava(), questions()
    model.get_base_model().model.language_model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    target = prepared(model, dataset)
    values = {target(model.train(), batch(dataset)).loss.item() for _ in range(3)}
    assert values == {target(model.eval(), batch(dataset)).loss.item()}


def test_gradient_checkpointing_keeps_the_gradient():
    """Layers recompute in training mode only, so switching everything to evaluation would switch it off."""
    dataset, recomputed = questions(), []
    expected = gradient(model := prompted_llava(), prepared(model, dataset), batch(dataset))
    model = prompted_llava()
    base = model.get_base_model()
    base.activation_checkpointing_enable()
    base.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *call: recomputed.append(1))
    target = prepared(model, dataset)
    assert_close(gradient(model, target, batch(dataset)), expected, rtol=1e-5, atol=1e-7)
    assert len(recomputed) == 2


def test_the_clip_may_look_at_the_models_own_images():
    """As in the official code, when sizes and normalisation are the same."""
    dataset = questions()
    model = prompted_llava()
    with pytest.raises(DataError, match=r"`pixel_values` of \(16, 16\) pixels per image.*got \(6, 3, 32, 32\)"):
        prepared(model, dataset, tse_clip=guide(processor=None))(model, batch(dataset))
    plain = questions(collator=QuestionCollator(llava_processor()))
    with pytest.raises(DataError, match=r"Expected `clip_pixel_values`.*got None"):
        prepared(model, plain)(model, batch(plain))


def test_tse_leaves_out_images_without_a_class():
    model, dataset = prompted_llava(), questions()
    target, columns = prepared(model, dataset), batch(dataset)
    some = batch(dataset, [0, 1])
    expected = target(model, some).loss_terms["tse"]
    columns["labels"][2:] = -1
    assert_close(target(model, columns).loss_terms["tse"], expected)
    columns["labels"][:] = -1
    assert target(model, columns).loss_terms["tse"] == 0


def test_a_clip_serves_one_run_after_the_other():
    """Seeds of an experiment share their CLIP: it must carry the prompt in training, and no older one."""
    clip, dataset = guide(), questions()
    for seed in range(2):
        model = prompted_llava(size=0.1 + seed)
        target = prepared(model, dataset, tse_clip=clip)
        fresh = prompted_llava(size=0.1 + seed)
        expected = prepared(fresh, dataset)(fresh, batch(dataset)).loss_terms
        assert_close(target(model, batch(dataset)).loss_terms, expected)
        target.prepare(model, dataset)
        assert sum(isinstance(m, type(prompt_layer_of(model))) for m in clip.model.modules()) == 1


@pytest.mark.parametrize("base", [tiny_clip, tiny_siglip])
def test_on_a_clip_the_task_is_cross_entropy_over_its_class_prompts(base):
    model = get_peft_model(base(), TVPConfig.for_processor(clip_processor(16), canvas_size=16, border=3)).eval()
    with torch.no_grad():
        prompt_parameter(model).normal_(std=0.3)
    prompts = class_prompts() if base is tiny_clip else _siglip_prompts()
    target = TVPObjective(prompts, fca_weight=0.5, tse_weight=0)
    dataset = images(per_class=1)
    target.prepare(model, dataset)
    target.epoch_start(model, dataset, 0)
    columns = dataset.collate([dataset[i] for i in range(6)])
    output = target(model, columns)
    logits = model(pixel_values=columns["pixel_values"], input_ids=prompts.input_ids).logits_per_image
    assert_close(output.logits, logits, rtol=1e-5, atol=1e-4)
    assert_close(output.loss_terms["cross_entropy"], nn.functional.cross_entropy(logits, columns["labels"]))
    with torch.no_grad(), without_prompt(model):
        clean = image_features(model, columns["pixel_values"])
    moved = image_features(model, columns["pixel_values"]) - clean
    assert_close(output.loss_terms["fca"], 0.5 * moved.norm(dim=-1).mean(), rtol=1e-4, atol=1e-5)
    assert_close(target.predict(model, columns), logits, rtol=1e-5, atol=1e-4)


def _siglip_prompts():
    return tokenize_classes(tiny_tokenizer(), colour_names(), template="{}", max_length=24, pad_to_max=True)


def test_settings_that_cannot_train_are_refused():
    for settings, message in (
        ({"tse_clip": None}, r"Expected a CLIP for TSE with `tse_weight`=0.1"),
        ({"fca_weight": -1}, "`fca_weight` of 0 or more, got -1"),
        ({"source_mode": "mean"}, r"\('average', 'alternate'\), got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(**settings)


def test_models_and_data_that_cannot_train_are_refused():
    dataset = questions()
    config = TVPConfig.for_processor(clip_processor(), canvas_size=32, border=5, modules_to_save=["linear_2"])
    with pytest.raises(ValueError, match="nothing to train but the prompt, got 2 further tensors"):
        prepared(get_peft_model(prompted_llava().unload(), config), dataset)
    with pytest.raises(AdapterError, match="Expected a model with a pixel prompt"):
        prepared(second_model(), dataset)
    with pytest.raises(DataError, match=r"class prompts of the CLIP for the 3 classes.*got 6"):
        prepared(prompted_llava(), dataset.restrict([2, 1, 0]))
    unanswered = ImageQuestionDataset(
        [{"image": noise_image(32, 32)}], question="What?", collator=QuestionCollator(llava_processor())
    )
    with pytest.raises(ValueError, match="Expected labels for TSE"):
        prepared(prompted_llava(), unanswered)
    with pytest.raises(DataError, match="Expected a batch with answers"):
        prepared(prompted_llava(), unanswered, tse_weight=0)
    wrong = questions(collator=QuestionCollator(llava_processor(patch_size=4)))
    with pytest.raises(DataError, match="Image tokens and image features differ"):
        prepared(prompted_llava(), wrong)
    with pytest.raises(AdapterError, match="Expected candidate answers to choose from"):
        TVPObjective(None, tse_weight=0).predict(prompted_llava(), batch(dataset))


def test_images_that_nobody_shrinks_are_refused():
    """`shrink="processor"` with the model's plain processor."""
    with pytest.raises(DataError, match="a `processor` that shrinks images"):
        prepared(prompted_llava(shrink="processor"), questions())
    with pytest.raises(DataError, match="a `processor` that shrinks images"):
        evaluate_prompt(prompted_llava(shrink="processor"), questions())
    shrinking = QuestionCollator(ShrinkingProcessor(llava_processor(), canvas_size=32, border=5, upscale=True))
    with pytest.raises(DataError, match="or gets them at full size"):
        evaluate_prompt(prompted_llava(shrink="processor"), questions().with_collator(shrinking))
