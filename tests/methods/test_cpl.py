"""CPL by hand: nearest classes, search, counterfactuals, the mask as state of a run, what is refused."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import normalize
from torch.testing import assert_close

from peft_vlm import CoCoOpObjective, CoOpConfig, CPLObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data.dataset import collate
from peft_vlm.errors import AdapterError, ClassNameError, DataError
from peft_vlm.hub import AdapterFolder, write_folder
from peft_vlm.methods.cpl import greedy_target, preset_for
from peft_vlm.methods.cpl.objective import nearest_classes
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import conditioned_logits, encode_classes, tokenize_classes
from tests.cases import CASES as ALL_CASES
from tests.cases import augmented, base_model, class_prompts, images, perturb, pixels, prepared
from tests.tiny import CONTEXT_LENGTH, colour_names, tiny_tokenizer

(CASE,) = [case for case in ALL_CASES if case.method == "cpl"]
NAMES = list(colour_names())


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(base_model(), CASE.config())
    perturb(model)
    return model.train()


def batch_of(dataset, indices=range(0, 24, 5)):
    return collate([dataset[i] for i in indices])


def test_the_search_exchanges_the_numbers_that_help_most():
    """By hand: the third number brings the image past the negative text at once, the first would not."""
    features, negatives = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    own, other = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.2, 1.0]])
    assert greedy_target(features, negatives, own, other).tolist() == [[-1.0, -1.0, 1.0]]
    # here that is not enough: the own text still scores higher, and the number that speaks for it goes too
    far = greedy_target(torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]]), own, other)
    assert far.tolist() == [[1.0, -1.0, 1.0]]
    hopeless = greedy_target(features, -negatives, own, other)
    assert hopeless[0, 2] == 1.0, "the last dimension, where no exchange scores above 0"


def test_nearest_classes_are_those_of_the_most_similar_texts_with_images():
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    names = ["a", "b", "c", "d"]
    assert nearest_classes(texts, names, [True] * 4, None).tolist() == [1, 0, 3, 2]
    assert nearest_classes(texts, names, [True, False, True, True], None).tolist()[0] == 3
    table = {"a": "c", "b": "c", "c": "a", "d": "a"}
    assert nearest_classes(texts, names, [True] * 4, table).tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "b"}, "negative class for 'b' in `nearest`, got none"),
        ({"a": "a", "b": "a"}, "another class with training images for 'a'.*got 'a'"),
        ({"a": "c", "b": "a"}, "another class with training images for 'a'.*got 'c'"),
        ({"a": "z", "b": "a"}, "names of the classes in `nearest`, got 'z'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, message):
    """A class that is its own negative, or one without images, would have no counterfactual."""
    with pytest.raises(ClassNameError, match=message):
        nearest_classes(torch.eye(3), ["a", "b", "c"], [True, True, False], table)


def test_the_loss_is_that_of_the_formula():
    model, dataset = adapted(), images()
    objective = prepared(CASE, model, dataset, contrastive_weight=0.5, norm_weight=0.2, momentum=0.9)
    with torch.no_grad():
        objective.mask.copy_(torch.rand(objective.mask.shape))
        batch = batch_of(dataset)
        output = objective(model, batch)
        layer = towers_of(model).token_embedding
        features = image_features(model, batch["pixel_values"])
        terms = []
        for feature, label in zip(features, batch["labels"].tolist(), strict=True):
            mask = (0.9 * objective.target[label] + 0.1 * objective.mask[label]).clamp(0, 1)
            unit = feature / feature.norm()
            mixed = (1 - mask) * unit + mask * objective.negatives[label]
            with layer.shifted_by(layer.shifts(feature[None])[0]):
                texts = encode_classes(model, class_prompts())
            pairs = torch.stack([texts @ unit, texts @ (mixed / mixed.norm())], dim=1)
            contrast = -(pairs[:, 0].exp() / pairs.exp().sum(dim=1)).log().mean()
            terms.append(torch.stack([contrast, mask.norm()]))
        contrast, norm = torch.stack(terms).mean(dim=0)
        plain = CoCoOpObjective(class_prompts(), image_cache="none")
        plain.prepare(model, dataset)
        expected = {"cross_entropy": plain(model, batch).loss, "contrastive": 0.5 * contrast, "mask_norm": 0.2 * norm}
    assert list(output.loss_terms) == list(expected)
    for name, value in expected.items():
        assert_close(output.loss_terms[name], value, rtol=1e-4, atol=1e-5)


def test_a_class_takes_an_image_of_its_nearest_class():
    model, dataset = adapted(), images()
    table = dict(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
    objective = prepared(CASE, model, dataset, nearest=table)
    places = [dataset.labels.index(NAMES.index(table[name])) for name in NAMES]
    with torch.no_grad(), model.disable_adapter():
        features = image_features(model, torch.stack([dataset[i]["pixel_values"] for i in places]))
    assert_close(objective.negatives, normalize(features, dim=-1))
    assert json.loads(json.dumps(objective.config_dict()))["nearest"] == table


def test_negatives_are_the_same_in_every_epoch_of_augmented_images():
    """Drawn per epoch they would differ after a resume."""
    model, found = adapted(), []
    for epoch in (0, 3):
        dataset = augmented()
        dataset.set_epoch(epoch)
        objective = CPLObjective(class_prompts(), image_cache="none")
        objective.prepare(model, dataset)
        found.append(objective)
    assert torch.equal(found[0].negatives, found[1].negatives)
    assert torch.equal(found[0].target, found[1].target)


def run(folder, *, epochs: int = 3, resume=None, **settings):
    torch.manual_seed(3)
    model = get_peft_model(base_model(), CASE.config())
    objective = CPLObjective(class_prompts(), momentum=0.5, **settings)
    args = VLMTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = VLMTrainer(model, args, train_dataset=images(), objective=objective)
    trainer.train(resume_from_checkpoint=resume)
    return objective, trainer


def test_a_resumed_run_ends_with_the_mask_of_one_that_never_stopped(tmp_path):
    """The mask is no tensor of the model: without its own state and momentum a resume would start it anew."""
    straight, _ = run(tmp_path / "a")
    assert straight.mask is not None
    assert (straight.mask - 1).abs().max() > 1e-4, "the mask moves, or the test says nothing"
    resumed, _ = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(resumed.mask, straight.mask)
    state = resumed.state_dict()
    with pytest.raises(ValueError, match=r"mask of shape \(6, 16\), got .*5, 16"):
        resumed.load_state_dict({"mask": state["mask"][:5]})


def test_the_gradient_of_the_mask_does_not_pile_up(tmp_path):
    """Nobody else clears it, and a sum over all steps would run away."""
    objective, _ = run(tmp_path, epochs=1)
    assert objective.mask is not None
    assert objective.mask.grad is None
    steps, _ = run(tmp_path / "again", epochs=1, contrastive_weight=0.0, norm_weight=0.0)
    assert steps.mask is not None
    decay = (1 - steps.mask).abs().max()
    assert decay < 1e-3, "without a term that reads the mask only the weight decay moves it"


def test_the_result_is_an_ordinary_adapter_of_cocoop(tmp_path):
    _, trainer = run(tmp_path / "run", epochs=1)
    again = PeftModel.from_pretrained(base_model(), tmp_path / "run").eval()
    assert again.active_peft_config.peft_type == "COCOOP"
    with torch.no_grad():
        logits = conditioned_logits(again, class_prompts(), image_features(again, pixels()))
        predicted = trainer.objective.predict(trainer.model.model.eval(), {"pixel_values": pixels()})
    assert_close(predicted, logits)
    (tmp_path / "published").mkdir()
    place = {"repo_id": "owner/name", "license": "mit", "title": "name", "note": ""}
    write_folder(AdapterFolder.read(tmp_path / "run"), tmp_path / "published", **place)
    published = {path.name for path in (tmp_path / "published").iterdir()}
    assert "adapter_model.safetensors" in published
    assert not any("state" in name for name in published), "the mask is of no use to others"


def test_what_cannot_have_a_counterfactual_is_refused():
    prompts = class_prompts()
    with pytest.raises(ValueError, match="`norm_weight` of 0 or more, got -1"):
        CPLObjective(prompts, norm_weight=-1)
    with pytest.raises(ValueError, match="`momentum` from 0 to 1, got 2"):
        CPLObjective(prompts, momentum=2)
    both = tokenize_classes(tiny_tokenizer(), colour_names(), template=["a {}.", "{}!"], max_length=CONTEXT_LENGTH)
    with pytest.raises(ClassNameError, match="one template, got 2"):
        CPLObjective(prompts, name_prompts=both)
    with pytest.raises(ClassNameError, match="Tokenise the same names"):
        CPLObjective(prompts, name_prompts=class_prompts(["red", "green"]))
    other = get_peft_model(base_model(), CoOpConfig(num_text_tokens=2))
    with pytest.raises(AdapterError, match="active CoCoOp adapter, got 'COOP'"):
        CPLObjective(prompts).prepare(other, images())
    with pytest.raises(AdapterError, match="active CoCoOp adapter, got None"):
        CPLObjective(prompts).prepare(base_model(), images())
    one = images().select([0, 1])
    assert len(set(one.labels)) == 1
    with pytest.raises(ValueError, match="images of two classes or more"):
        CPLObjective(prompts).prepare(adapted(), one)
    with pytest.raises(RuntimeError, match="Expected `prepare"):
        CPLObjective(prompts)(adapted(), batch_of(images()))
    with pytest.raises(DataError, match="got a stream"):
        CPLObjective(prompts).check_stream()


def test_the_preset_is_that_of_cocoop():
    preset = preset_for()
    assert preset.config == {"num_text_tokens": 4, "context_init": "a photo of a"}
    assert preset.training["num_train_epochs"] == 10
