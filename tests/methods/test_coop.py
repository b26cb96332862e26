"""CoOp's loss by hand, its image features, what it refuses, and its use with other parts of the package."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import pipeline

from peft_vlm import CoOpConfig, CoOpObjective, PromptedClassifier, VLMTrainer, VLMTrainingArguments
from peft_vlm.data.dataset import collate
from peft_vlm.errors import AdapterError, ClassNameError
from peft_vlm.methods.coop import preset_for
from peft_vlm.text import encode_classes, reserve_slots, tokenize_classes
from tests.cases import CASES as ALL_CASES
from tests.cases import NUM_CLASSES, augmented, class_prompts, images, perturb, pixels, prepared, processor
from tests.tiny import CONTEXT_LENGTH, colour_names, tiny_clip, tiny_tokenizer

(CASE,) = [case for case in ALL_CASES if case.method == "coop"]


def fresh(**settings):
    model = get_peft_model(tiny_clip(), CASE.config(**settings))
    perturb(model)
    return model


def test_the_loss_is_the_cross_entropy_of_the_models_own_logits():
    """By hand: -log of the softmax of the right class, averaged over the batch."""
    model, dataset = fresh(), images()
    batch = collate([dataset[i] for i in (0, 7, 14, 21)])
    output = prepared(CASE, model, dataset)(model, batch)
    ids = reserve_slots(model, class_prompts()).input_ids
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"], input_ids=ids).logits_per_image
    by_hand = -sum(
        logits[row].exp()[label].log() - logits[row].exp().sum().log() for row, label in enumerate(batch["labels"])
    )
    assert_close(output.loss.detach(), by_hand / 4, rtol=1e-5, atol=1e-5)
    assert_close(output.logits.detach(), logits, rtol=1e-5, atol=1e-4)


def test_stored_and_computed_image_features_give_the_same_loss():
    model, dataset = fresh(), augmented()
    dataset.set_epoch(1)
    batch = collate([dataset[i] for i in (0, 7, 14, 21)])
    losses = []
    for image_cache in ("ram", "none"):
        objective = CoOpObjective(class_prompts(), image_cache=image_cache)
        assert objective.needs_pixels == (image_cache == "none")
        objective.prepare(model, dataset)
        objective.epoch_start(model, dataset, 1)
        losses.append(objective(model, batch).loss.detach())
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("random", "settings", "expected"),
    [
        (False, {}, [24, 0, 0]),
        (True, {}, [4, 4, 4]),
        (True, {"image_cache": "ram"}, [24, 24, 24]),
        (True, {"num_views": 2}, [24, 24, 0]),
    ],
)
def test_the_vision_tower_runs_again_only_for_new_pixels(random, settings, expected):
    """Fixed pixels need one pass for all epochs, views that return one each; never one with autograd."""
    model, dataset = fresh(), augmented() if random else images()
    calls: list[tuple[int, bool]] = []
    layer = model.get_base_model().vision_model.encoder.layers[0]
    layer.register_forward_hook(lambda _, args, output: calls.append((len(args[0]), output.requires_grad)))
    objective = CoOpObjective(class_prompts(), cache_batch_size=10, **settings)
    objective.prepare(model, dataset)
    seen = []
    for epoch in range(3):
        calls.clear()
        dataset.set_epoch(epoch)
        objective.epoch_start(model, dataset, epoch)
        objective(model, collate([dataset[i] for i in range(4)])).loss.backward()
        seen.append(sum(count for count, _ in calls))
        assert not any(grad for _, grad in calls)
    assert seen == expected


def test_text_is_cut_to_its_real_length():
    model, dataset = fresh(), images()
    lengths: list[int] = []
    layer = model.get_base_model().text_model.encoder.layers[0]
    objective = prepared(CASE, model, dataset)
    layer.register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
    objective(model, collate([dataset[0]]))
    assert lengths == [1 + 1 + 6 + 1 + 1]  # start, context for "a", "orange", ".", end: of 40 positions


def test_learning_lowers_the_loss(tmp_path):
    """From a random context, through the trainer, without pixels in the batches."""
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=4))
    prompts = tokenize_classes(tiny_tokenizer(), colour_names(NUM_CLASSES), template="{}", max_length=CONTEXT_LENGTH)
    args = VLMTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=8,
        warmup_epochs=0,
        learning_rate=0.1,
        per_device_train_batch_size=24,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = VLMTrainer(model, args, train_dataset=images(), objective=CoOpObjective(prompts))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]


def specific(**settings):
    """A model with a context for each colour."""
    torch.manual_seed(0)
    ids = class_prompts().input_ids.tolist()
    own = {"num_text_tokens": 2, "class_specific": True, "class_token_ids": ids}
    return get_peft_model(tiny_clip(), CoOpConfig(**(own | settings))).eval()


def test_a_context_per_class_is_a_coop_adapter_for_each_class():
    """By hand: the feature of class c is that of a CoOp adapter with the context of c."""
    model = specific()
    (contexts,) = [p for p in model.parameters() if p.requires_grad]
    assert contexts.shape == (NUM_CLASSES, 2, 32)
    features = encode_classes(model, class_prompts())
    plain = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2)).eval()
    (shared,) = [p for p in plain.parameters() if p.requires_grad]
    for label, context in enumerate(contexts):
        with torch.no_grad():
            shared.copy_(context)
        assert_close(features[label], encode_classes(plain, class_prompts())[label], rtol=1e-5, atol=1e-5)


def test_classes_with_contexts_come_in_any_order_and_new_ones_are_refused(tmp_path):
    """A context in the place of another class's would be a wrong answer without an error."""
    model = specific()
    features = encode_classes(model, class_prompts())
    names = list(class_prompts().class_names)
    assert_close(encode_classes(model, class_prompts(names[::-1])), features.flip(0), rtol=1e-5, atol=1e-5)
    assert_close(encode_classes(model, class_prompts(names[2:4])), features[2:4], rtol=1e-5, atol=1e-5)
    with pytest.raises(ClassNameError, match=r"of the 6 classes .*at position 1.*nothing to say about new classes"):
        encode_classes(model, class_prompts(["red", "pink"]))
    other = tokenize_classes(tiny_tokenizer(), names, template="the {}.", max_length=CONTEXT_LENGTH)
    with pytest.raises(ClassNameError, match="in the template of its training"):
        encode_classes(model, other)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path, adapter_name="other").eval()
    assert torch.equal(encode_classes(again, class_prompts()), features)


def test_contexts_per_class_train_and_lie_beside_a_shared_one(tmp_path):
    model = specific()
    before = encode_classes(model, class_prompts())
    args = VLMTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.1, warmup_epochs=0, use_cpu=True, disable_tqdm=True
    )
    VLMTrainer(model, args, train_dataset=images(), objective=CoOpObjective(class_prompts())).train()
    trained = encode_classes(model, class_prompts())
    assert (trained - before).abs().max() > 1e-4
    model.add_adapter("shared", CoOpConfig(num_text_tokens=3))
    model.set_adapter("shared")
    assert not torch.equal(encode_classes(model, class_prompts()), trained)
    assert encode_classes(model, class_prompts(["quite", "new"])).shape == (2, 16)
    model.set_adapter("default")
    assert torch.equal(encode_classes(model, class_prompts()), trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_specific": True}, "nothing to say about new classes"),
        (
            {"class_specific": True, "class_names": ["a"], "template": "{}.", "context_init": "a"},
            "leave the words out",
        ),
        ({"class_token_ids": [[512, 5, 513]]}, "without `class_specific`=True"),
    ],
)
def test_contexts_per_class_need_a_class_list_and_no_words(settings, message):
    with pytest.raises(ValueError, match=message):
        CoOpConfig(**settings)


def test_class_names_need_a_tokenizer_beside_the_base_model(tmp_path):
    """The tuner reads the names itself where it can."""
    settings = {"num_text_tokens": 2, "class_specific": True, "class_names": ["red", "blue"], "template": "a {}."}
    with pytest.raises(ValueError, match="no tokenizer to read the class names.*class_token_ids=prompts"):
        get_peft_model(tiny_clip(), CoOpConfig(**settings))
    tiny_clip().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    model = get_peft_model(type(tiny_clip()).from_pretrained(tmp_path), CoOpConfig(**settings))
    assert len(model.active_peft_config.class_token_ids) == 2
    assert encode_classes(model, class_prompts(["blue", "red"])).shape == (2, 16)


def test_the_number_of_words_is_the_number_of_vectors():
    """The official code overrides `N_CTX` too; it counts words, we count tokens, since a word may be several."""
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=16, context_init_ids=[5, 6, 7]))
    assert model.active_peft_config.num_text_tokens == 3
    assert [p.shape for p in model.parameters() if p.requires_grad] == [torch.Size([3, 32])]


def test_an_ensemble_an_unknown_cache_and_calls_out_of_order_are_refused():
    prompts = tokenize_classes(tiny_tokenizer(), ["a", "b"], template=["{}", "the {}"], max_length=CONTEXT_LENGTH)
    with pytest.raises(ValueError, match="one template, got 2"):
        CoOpObjective(prompts)
    with pytest.raises(ValueError, match=r"\('auto', 'ram', 'none'\), got 'disk'"):
        CoOpObjective(class_prompts(), image_cache="disk")
    model, dataset = fresh(), images()
    objective = CoOpObjective(class_prompts())
    with pytest.raises(RuntimeError, match="Expected `prepare"):
        objective(model, collate([dataset[0]]))
    objective.prepare(model, dataset)
    with pytest.raises(AdapterError, match="Call `epoch_start`"):
        objective(model, collate([dataset[0]]))


def test_what_else_trains_on_the_vision_side_learns_too():
    """Stored image features would be those of the start: nothing there would ever learn."""
    model, dataset = get_peft_model(tiny_clip(), CASE.config(modules_to_save=["visual_projection"])), images()
    objective = prepared(CASE, model, dataset)
    assert objective.needs_pixels
    objective(model, collate([dataset[i] for i in (0, 7, 14)])).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_new_class_names_need_no_training(position):
    """The context is shared, so any name can stand beside it."""
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=3, class_position=position)).eval()
    tools = processor()
    classifier = PromptedClassifier(model, tools.tokenizer, tools.image_processor, template="{}.")
    picture = images().image(0)
    for names in (["red", "green"], ["a new one", "red", "blue"]):
        predictions = classifier.predict(picture, class_names=names)
        prompts = tokenize_classes(tools.tokenizer, names, template="{}.", max_length=CONTEXT_LENGTH)
        with torch.no_grad():
            inputs = tools.image_processor(picture, return_tensors="pt")
            logits = model(**inputs, input_ids=reserve_slots(model, prompts).input_ids).logits_per_image
        expected = dict(zip(names, logits.softmax(-1)[0].tolist(), strict=True))
        assert {p.label: p.probability for p in predictions} == pytest.approx(expected, rel=1e-4)


def test_the_zero_shot_pipeline_works_with_slots_in_its_template():
    """It gives the adapter's scores, as without them; the model itself refuses prompts that reserve none."""
    model = fresh(context_init_ids=[5, 6]).eval()
    tools = processor()
    classify = pipeline(
        "zero-shot-image-classification",
        model=model.get_base_model(),
        tokenizer=tools.tokenizer,
        image_processor=tools.image_processor,
    )
    picture, names = images().image(0), ["red", "green", "blue"]
    template = "<|startoftext|><|startoftext|>{}."
    scores = {row["label"]: row["score"] for row in classify(picture, names, hypothesis_template=template)}
    prompts = tokenize_classes(tools.tokenizer, names, template="{}.", max_length=CONTEXT_LENGTH)
    with torch.no_grad():
        inputs = tools.image_processor(picture, return_tensors="pt")
        logits = model(**inputs, input_ids=reserve_slots(model, prompts).input_ids).logits_per_image
    assert scores == pytest.approx(dict(zip(names, logits.softmax(-1)[0].tolist(), strict=True)), rel=1e-4)
    assert {row["label"]: row["score"] for row in classify(picture, names, hypothesis_template="{}.")} == scores
    with pytest.raises(AdapterError, match="write the tokenizer's start token 2 times"):
        model(**inputs, input_ids=prompts.input_ids)


def test_adapters_of_other_lengths_and_positions_live_side_by_side():
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2)).eval()
    model.add_adapter("front", CoOpConfig(num_text_tokens=5, class_position="front"))
    prompts = tokenize_classes(tiny_tokenizer(), ["red", "blue"], template="{}.", max_length=CONTEXT_LENGTH)
    logits = {}
    for name in ("default", "front", "default"):
        model.set_adapter(name)
        with torch.no_grad():
            ids = reserve_slots(model, prompts).input_ids
            logits.setdefault(name, []).append(model(pixel_values=pixels(), input_ids=ids).logits_per_image)
    assert torch.equal(*logits["default"])
    assert not torch.equal(logits["default"][0], logits["front"][0])


def test_presets():
    assert preset_for(shots=16).config == {"num_text_tokens": 16, "context_init": None}
    assert preset_for("words", shots=16, imagenet=True).training["num_train_epochs"] == 50
    assert preset_for(shots=16).training["per_device_train_batch_size"] == 32
    with pytest.raises(ValueError, match="'random', 'words'"):
        preset_for("letters", shots=16)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        preset_for(shots=0)
