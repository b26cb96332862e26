"""Skip Tuning on the language layers of multimodal models: what trains, what is stored, and that it is the same."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
)

from peft_vlm import SkipTuningAnswerObjective, SkipTuningConfig, VLMTrainer, VLMTrainingArguments
from peft_vlm.data.question_collator import model_inputs
from peft_vlm.errors import AdapterError, UnsupportedModelError
from peft_vlm.methods.skip_tuning import answers
from peft_vlm.methods.skip_tuning.answers import AnswerStates
from peft_vlm.models.language_layers import language_layers_of
from peft_vlm.text.answers import tokenize_candidates
from tests.tiny import noise_image
from tests.tiny_mllm import ARCHITECTURES, IMAGE, blip, mllm_tokenizer, tiny_mllm
from tests.tiny_questions import colour_questions, tiny_llava

IMAGES = [noise_image(60, 40, seed=0), noise_image(60, 40, seed=1)]
START = 1


@pytest.fixture(params=sorted(ARCHITECTURES))
def name(request) -> str:
    return request.param


def question_batch(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model, and questions with answers for it: the last three tokens."""
    mllm = tiny_mllm(name)
    batch = mllm.inputs(IMAGES)
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    if name == "gemma3":
        batch["token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return mllm.model, batch | {"token_labels": labels, "index": torch.arange(2), "labels": torch.tensor([0, 1])}


def adapted(model: nn.Module, **settings) -> PeftModel:
    """A model with a Skip Tuning adapter that acts."""
    torch.manual_seed(0)
    return get_peft_model(model, SkipTuningConfig(**({"start_layer": START, "init_weights": False} | settings))).eval()


def test_language_layers_train_and_nothing_else(name):
    model, batch = question_batch(name)
    with torch.no_grad():
        base = model(**model_inputs(batch)).logits
    model = adapted(model)
    language = language_layers_of(model)
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    allowed = (*(f"{language.name}.{i}." for i in range(START, len(language.layers))), f"{language.norm_name}.")
    assert all(n.startswith(allowed) for n in trained)
    own = {n for n, _ in language.layers[START].named_parameters() if ".base_layer." in n}
    assert len([n for n in trained if n.startswith(allowed[0])]) == len(own) >= 9
    loss = model(**model_inputs(batch), labels=batch["token_labels"]).loss
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**model_inputs(batch)).logits, base)
    with torch.no_grad():
        assert (model(**model_inputs(batch)).logits - base).abs().max() > 1e-3


def test_stored_states_stand_for_the_images(name):
    """Vision side and lower layers do not run, and the logits are the same to the last bit."""
    model, batch = question_batch(name)
    model = adapted(model)
    language = language_layers_of(model)
    states = AnswerStates(language, START)
    states.check(model, batch)
    hidden = states.enter(model, batch)
    assert not hidden.requires_grad
    ran = []
    below = [language.layers[0].self_attn, *(m for n, m in model.named_modules() if n.endswith("patch_embedding"))]
    handles = [module.register_forward_hook(lambda *args: ran.append(args)) for module in below]
    with torch.no_grad(), language.entered_with(START, hidden):
        logits = language.reader(**language.text_inputs(model_inputs(batch)), use_cache=False).logits
    assert not ran
    with torch.no_grad():
        whole = model(**model_inputs(batch), use_cache=False).logits
    assert ran
    assert torch.equal(logits, whole)
    for handle in handles:
        handle.remove()


def test_saving_loading_and_merging_are_exact(name, tmp_path):
    """RMS norms among the copies, whose formula differs by family."""
    model, batch = question_batch(name)
    model = adapted(model)
    with torch.no_grad():
        expected = model(**model_inputs(batch)).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_mllm(name).model, tmp_path, adapter_name="other")
        assert torch.equal(again(**model_inputs(batch)).logits, expected)
        merged = again.merge_and_unload()
        assert torch.equal(merged(**model_inputs(batch)).logits, expected)
    assert merged.generate(**model_inputs(batch), max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cache_changes_neither_loss_nor_gradients(checkpointing):
    """Questions of different length share a batch; recomputed layers must see the stored states again."""
    outcomes = []
    for cache in ("ram", "none"):
        dataset = colour_questions(per_class=1)
        model = adapted(tiny_llava()).train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        objective = SkipTuningAnswerObjective(state_cache=cache, cache_batch_size=4)
        objective.prepare(model, dataset)
        objective.epoch_start(model, dataset, 0)
        batch = dataset.collate([dataset[i] for i in (0, 3, 5)])
        if cache == "ram":
            batch = {"index": batch["index"], "labels": batch["labels"]}
        output = objective(model, batch)
        output.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        outcomes.append((output.loss.detach(), output.logits.detach(), output.labels, gradients))
    # batches of another size are summed in another order by several threads: a few 1e-6 on logits near zero
    assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-5)


def test_states_are_stored_once_for_fixed_images_and_per_epoch_for_changing_ones(monkeypatch):
    fills = []
    original = AnswerStates.fill
    monkeypatch.setattr(AnswerStates, "fill", lambda *args, **kwargs: fills.append(1) or original(*args, **kwargs))
    model = adapted(tiny_llava())
    for augmentation, expected in ((None, 1), (lambda image, generator: image, 3)):
        dataset = colour_questions(per_class=1).with_augmentation(augmentation)
        objective = SkipTuningAnswerObjective()
        objective.prepare(model, dataset)
        for epoch in range(3):
            objective.epoch_start(model, dataset, epoch)
        assert len(fills) == expected
        fills.clear()


def test_the_trainer_learns_answers_from_stored_states(tmp_path):
    dataset = colour_questions(per_class=3)
    candidates = tokenize_candidates(mllm_tokenizer(), dataset.class_names)
    model = adapted(tiny_llava(), init_weights=True)
    args = VLMTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=6,
        learning_rate=3e-3,
        optim="adamw_torch",
        per_device_train_batch_size=6,
        eval_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    objective = SkipTuningAnswerObjective(candidates)
    trainer = VLMTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, objective=objective)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    scores = objective.predict(model, dataset.collate([dataset[0], dataset[1]]))
    assert scores.shape == (2, len(dataset.class_names))


def test_what_cannot_be_stored_is_refused_with_the_way_out():
    dataset = colour_questions(per_class=1)
    with pytest.raises(ValueError, match=r"start layer of 1 or more .*got 0 .*state_cache='none'"):
        SkipTuningAnswerObjective().prepare(adapted(tiny_llava(), start_layer=0), dataset)
    with pytest.raises(ValueError, match=r"\('ram', 'none'\), got 'disk'"):
        SkipTuningAnswerObjective(state_cache="disk")
    model = adapted(tiny_llava())
    objective = SkipTuningAnswerObjective()
    with pytest.raises(RuntimeError, match="`prepare"):
        objective(model, {})
    objective.prepare(model, dataset)
    with pytest.raises(AdapterError, match="an empty cache"):
        objective(model, {"index": torch.tensor([0])})
    with pytest.raises(AdapterError, match="free answers have no scores"):
        objective.predict(model, {})


def test_a_model_that_shows_images_to_its_upper_layers_is_noticed():
    """Stored states would train another function than the one that is used later."""
    model = tiny_llava()
    upper = model.get_decoder().layers[2]
    images = []
    model.register_forward_pre_hook(lambda *args: images.clear())
    model.model.vision_tower.register_forward_hook(lambda *args: images.append(1))
    upper.register_forward_hook(lambda module, args, output: output * torch.linspace(1, 1 + len(images), 32))
    with pytest.raises(UnsupportedModelError, match="hands images to them too"):
        SkipTuningAnswerObjective().prepare(adapted(model), colour_questions(per_class=1))


def test_start_layers_out_of_range_and_language_models_with_an_encoder_are_refused():
    with pytest.raises(ValueError, match="`start_layer` from 0 to 2 for a language model of 3 layers, got 3"):
        adapted(tiny_llava(), start_layer=3)
    with pytest.raises(ValueError, match="`text_start_layer` from 0 to 2"):
        adapted(tiny_llava(), text_start_layer=5)
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    model = Blip2ForConditionalGeneration(Blip2Config(**(blip() | {"text_config": t5})))
    with pytest.raises(UnsupportedModelError, match="decoder alone, got `Blip2ForConditionalGeneration`"):
        adapted(model)


def test_the_room_for_all_states_is_checked_after_the_first_batch(monkeypatch):
    """They grow with the questions, and a process that runs out of memory is killed without a word."""
    asked = []
    monkeypatch.setattr(answers, "check_room", lambda size, *args, **kwargs: asked.append(size))
    model, dataset = adapted(tiny_llava()), colour_questions(per_class=1)
    objective = SkipTuningAnswerObjective(cache_batch_size=2)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    longest = max(row["hidden_states"].shape[0] for i, row in objective._states.rows.items() if i < 2)
    assert asked == [len(dataset) * longest * 32 * 4]
