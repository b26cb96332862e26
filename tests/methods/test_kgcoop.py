"""KgCoOp's distance by hand, what it does to training, what it refuses."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, CoOpObjective, KgCoOpObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data.dataset import collate
from peft_vlm.methods.kgcoop import preset_for
from peft_vlm.text import encode_classes, tokenize_classes
from tests.cases import NUM_CLASSES, class_prompts, images, perturb
from tests.tiny import CONTEXT_LENGTH, colour_names, tiny_clip, tiny_tokenizer


def adapted(**settings):
    """A tiny CLIP with a random context of two vectors."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), CoOpConfig(**({"num_text_tokens": 2} | settings)))
    perturb(model)
    return model


def prompts_in(template: str, names=None):
    """Prompts of the colour classes in a template."""
    names = names or colour_names(NUM_CLASSES)
    return tokenize_classes(tiny_tokenizer(), names, template=template, max_length=CONTEXT_LENGTH)


def output_of(objective, model, indices=(0, 7, 14, 21)):
    """Loss and logits of a batch."""
    dataset = images()
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    return objective(model, collate([dataset[i] for i in indices]))


def test_the_terms_by_hand():
    """1 - the mean over all classes of the cosine to the frozen feature, not over the classes of the batch."""
    model = adapted()
    anchors = prompts_in("a {}.")
    output = output_of(KgCoOpObjective(prompts_in("{}."), anchor_prompts=anchors, weight=3.0), model)
    own = encode_classes(model, prompts_in("{}."))
    with model.disable_adapter():
        frozen = encode_classes(model, anchors)
    cosines = [float((a * b).sum()) for a, b in zip(own, frozen, strict=True)]
    assert len(cosines) == NUM_CLASSES
    assert output.loss_terms["knowledge"].item() == pytest.approx(3 * (1 - sum(cosines) / NUM_CLASSES), rel=1e-4)
    plain = output_of(CoOpObjective(prompts_in("{}.")), model)
    assert_close(output.loss_terms["cross_entropy"], plain.loss, rtol=0, atol=0)
    assert torch.equal(output.logits, plain.logits)


def test_without_anchors_of_their_own_the_prompts_are_the_anchors():
    """A context that spells the template's own words starts at distance 0."""
    words = tiny_tokenizer()("a", add_special_tokens=False)["input_ids"]
    model = get_peft_model(tiny_clip(), CoOpConfig(context_init_ids=words))
    output = output_of(KgCoOpObjective(class_prompts()), model)
    assert output.loss_terms["knowledge"].item() == pytest.approx(0, abs=1e-5)


def test_a_heavy_weight_keeps_the_class_features_close(tmp_path):
    """The purpose of the method: with weight 0 it is CoOp, which drifts further from the hand-written prompts."""
    distances = []
    for weight in (0.0, 1000.0):
        model = adapted()
        args = VLMTrainingArguments(
            output_dir=str(tmp_path / str(weight)),
            max_steps=20,
            learning_rate=0.01,
            per_device_train_batch_size=24,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        objective = KgCoOpObjective(prompts_in("{}."), anchor_prompts=prompts_in("a {}."), weight=weight)
        VLMTrainer(model, args, train_dataset=images(), objective=objective).train()
        with model.disable_adapter():
            frozen = encode_classes(model, objective.anchor_prompts)
        distances.append(float(1 - (encode_classes(model, objective.prompts) * frozen).sum(-1).mean()))
    assert distances[1] < 0.8 * distances[0]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"6 classes of `prompts`, in their order, got 2: \['red', 'green'\]"):
        KgCoOpObjective(class_prompts(), anchor_prompts=prompts_in("{}.", ["red", "green"]))
    with pytest.raises(ValueError, match="0 or more, got -1"):
        KgCoOpObjective(class_prompts(), weight=-1)
    with pytest.raises(ValueError, match="'base_to_new'"):
        preset_for("few_shot")


def test_the_preset_is_the_official_one():
    preset = preset_for()
    assert preset.config == {"num_text_tokens": 4, "context_init": "a photo of a"}
    assert preset.objective == {"weight": 8.0}
    assert preset.training["per_device_train_batch_size"] == 128
