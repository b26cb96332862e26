"""Skip Tuning against the official code: features, losses, gradients, class skipping, training steps, schedules.

Tolerances: 1e-5 of the largest entry unless another is given; plain Hugging Face models reproduced the recording to
1e-6 (losses) and 8e-6 (gradients).
"""

import random

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import SkipTuningConfig, SkipTuningObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.errors import DataError
from peft_vlm.methods.skip_tuning.objective import SkipTuningBatchSampler, preset_for
from peft_vlm.models.towers import image_features, similarity_logits, text_features
from peft_vlm.text.prompts import ClassPrompts
from peft_vlm.training.schedule import epoch_cosine
from tests.parity.recorded import RecordedImages, assert_close_to_max, batch_of, facts, recorded_clip, tensors


def prompts_of(input_ids: torch.Tensor) -> ClassPrompts:
    """Class prompts from recorded token ids."""
    return ClassPrompts(tuple(f"class {i}" for i in range(len(input_ids))), ("{}",), input_ids)


def setup(case: str, *, num_classes: int, labels: torch.Tensor, **objective_settings):
    """A tuned tiny CLIP with a prepared objective."""
    recorded = tensors(case)
    inputs = tensors("clip_inputs")
    ids = inputs["tokens7"] if num_classes == 7 else inputs["tokens40"]
    model = get_peft_model(recorded_clip("tiny_clip"), SkipTuningConfig(start_layer=2))
    settings = {"image_cache": "ram"} | objective_settings
    objective = SkipTuningObjective(prompts_of(ids), batch_composition="random", **settings)
    dataset = RecordedImages(recorded["pixel_values"], labels, objective.prompts.class_names)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    return model, objective, dataset


@pytest.fixture(scope="module")
def s1():
    return tensors("S1_lskip"), facts("S1_lskip")


def test_zero_shot_logits_equal_the_official_clip():
    inputs = tensors("clip_inputs")
    model = recorded_clip("tiny_clip")
    image = image_features(model, inputs["images12"])
    text = torch.cat([text_features(model, inputs["tokens7"]), text_features(model, inputs["tokens40"])])
    assert_close_to_max(similarity_logits(model, image, text), inputs["logits_12x47"])


def test_trainable_and_frozen_tensors_are_the_official_ones(s1):
    """A forgotten norm or a trained logit scale would only show as slightly worse accuracy."""
    model = get_peft_model(recorded_clip("tiny_clip"), SkipTuningConfig(start_layer=2))
    trained = {hf_name(name) for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 70
    assert trained == set(s1[1]["trainable_hf"])
    base = {name for name, _ in recorded_clip("tiny_clip").named_parameters()}
    assert base - trained == set(s1[1]["frozen_hf"])


def hf_name(name: str) -> str:
    """Name of the base tensor that an adapter tensor stands for."""
    name = name.removeprefix("base_model.model.").removesuffix(".default")
    return name.replace("skip_tuning_", "")


def test_lskip_features_prototypes_loss_and_gradients(s1):
    recorded, info = s1
    model, objective, dataset = setup("S1_lskip", num_classes=7, labels=recorded["labels"], top_ratio=1.0)
    assert_close_to_max(objective.cache.store.rows, recorded["mid_image"])
    _, hidden, prototypes = objective._text
    assert_close_to_max(hidden, recorded["mid_text"])
    assert_close_to_max(prototypes, recorded["class_prototypes"])
    output = objective(model, batch_of(dataset, recorded["batch_index"].tolist()))
    assert_close_to_max(output.logits, recorded["batch_logits"])
    assert output.loss.item() == pytest.approx(info["loss"], rel=1e-5)
    output.loss.backward()
    gradients = {hf_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 70
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):  # analytically zero: softmax ignores a shift; both sides hold noise
            assert float(gradient.abs().max()) < 1e-6
        else:
            assert_close_to_max(gradient, recorded[f"grad.{name}"], 2e-5)


def test_evaluation_logits_come_from_the_full_model(s1):
    recorded, _ = s1
    model, objective, _ = setup("S1_lskip", num_classes=7, labels=recorded["labels"], top_ratio=1.0)
    with torch.no_grad():
        logits = objective.predict(model, {"pixel_values": recorded["pixel_values"]})
    assert_close_to_max(logits, recorded["eval_logits"])


@pytest.mark.parametrize("case", ["k20", "k8", "abs12"])
def test_cskip_keeps_the_official_classes(case: str):
    """Ranks, mask, selected classes, remapped labels and losses of three batches under one recorded tail draw."""
    recorded, settings = tensors("S2_cskip"), facts("S2_cskip")["cases"][case]
    model, objective, dataset = setup(
        "S2_cskip",
        num_classes=40,
        labels=recorded["labels"],
        top_ratio=settings["top_ratio"],
        max_top=settings["max_top"],
        tail_scale=settings["lam"],
    )
    assert objective.num_top == settings["num_top"]
    assert_close_to_max(objective.keep_probability, recorded[f"{case}.keep_probability"])
    state = objective.state_dict()
    objective.load_state_dict({**state, "tail_uniform": recorded[f"{case}.uniform_draw"]})
    keep_rank = objective.tail_uniform < objective.keep_probability
    assert torch.equal(keep_rank, recorded[f"{case}.reserve_mask"])
    assert len(settings["batches"]) == 3
    for expected in settings["batches"]:
        output = objective(model, batch_of(dataset, expected["batch"]))
        assert output.labels.tolist() == expected["remapped_labels"]
        assert output.logits.shape == (len(expected["batch"]), len(expected["kept_classes"]))
        assert float(output.loss.detach()) == pytest.approx(expected["loss"], rel=1e-5)
        assert selected_classes_of(objective, model, dataset, expected["batch"]) == expected["kept_classes"]


def selected_classes_of(objective, model, dataset, indices) -> list[int]:
    """Kept classes of a batch, from the objective's own rule."""
    batch = batch_of(dataset, indices)
    image = image_features(model, dataset.pixel_values[batch["index"]]).detach()
    return objective._select_classes(image, objective._text[2], batch["labels"]).tolist()


def test_ratio_one_ignores_the_cap_and_draws_nothing():
    recorded, edge = tensors("S2_cskip"), facts("S2_cskip")["edge_cases"]["ratio_1_ignores_max_top"]
    model, objective, dataset = setup(
        "S2_cskip", num_classes=40, labels=recorded["labels"], top_ratio=1.0, max_top=edge["max_top"]
    )
    output = objective(model, batch_of(dataset, [0, 1, 2, 3]))
    assert output.logits.shape[1] == edge["kept"]
    losses = [
        float(objective(model, batch_of(dataset, b["batch"])).loss.detach())
        for b in facts("S2_cskip")["cases"]["k20"]["batches"]
    ]
    assert any(loss == pytest.approx(edge["loss"], rel=1e-5) for loss in losses)


@pytest.mark.parametrize("run", ["staged_2e-5", "flat_2e-5", "flat_1e-3", "cskip_1e-3"])
@pytest.mark.parametrize("through", ["optimizer", "trainer"])
def test_five_sgd_steps(run: str, through: str, tmp_path):
    """Losses, final tensors (to 1 % of their change) and evaluation logits after five steps on fixed batches.

    Once with the objective and a plain loop, once through `VLMTrainer`, which adds its data loader, scheduler and
    loop.
    """
    recorded, info = tensors("S3_sgd"), facts("S3_sgd")
    settings = info["runs"][run]["settings"]
    skipping = {"top_ratio": settings.get("top_ratio", 1.0), "max_top": settings.get("max_top", 50)}
    labels = recorded[f"{run}.labels"]
    num_classes = recorded[f"{run}.eval_logits"].shape[1]
    model, objective, dataset = setup("S3_sgd", num_classes=num_classes, labels=labels, **skipping)
    if "top_ratio" in settings:
        draw = (~recorded[f"{run}.reserve_mask"]).float()  # 0 keeps a rank, 1 drops it
        objective.load_state_dict({**objective.state_dict(), "tail_uniform": draw})
    losses = train(model, objective, dataset, info["batches"], settings, through, tmp_path)
    assert losses == pytest.approx(info["runs"][run]["losses"], rel=1e-5)
    tuned = {hf_name(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert len(info["runs"][run]["max_abs_change"]) == 4
    for name, change in info["runs"][run]["max_abs_change"].items():
        assert_close(tuned[name], recorded[f"{run}.final.{name}"], rtol=0.0, atol=0.01 * change)
    with torch.no_grad():
        logits = objective.predict(model, {"pixel_values": recorded["pixel_values"]})
    assert_close_to_max(logits, recorded[f"{run}.eval_logits"])


def train(model, objective, dataset, batches, settings, through, folder) -> list[float]:
    """Five steps; losses before each."""
    rates = {"learning_rate": settings["lr"], "vision_learning_rate": settings.get("new_lr")}
    args = VLMTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        warmup_epochs=0,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **rates,
    )
    trainer = VLMTrainer(model, args, train_dataset=dataset, objective=objective)
    if through == "trainer":
        objective.batch_sampler = lambda *a, **k: FixedBatches(batches)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer, losses = trainer.create_optimizer(), []
    for indices in batches:
        optimizer.zero_grad()
        loss = objective(model, batch_of(dataset, indices)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class FixedBatches(SkipTuningBatchSampler):
    """The recorded batches in their order."""

    def __init__(self, batches: list[list[int]]) -> None:
        super().__init__([0] * 4, batch_size=4, seed=0, composition="random")
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize(
    ("protocol", "file"),
    [
        ("base_to_new", "vit_b16_bs4.yaml"),
        ("cross_dataset", "vit_b16_bs4_cross_datasets.yaml"),
        ("few_shot", "vit_b16_bs4_few_shot.yaml"),
    ],
)
@pytest.mark.parametrize("quarter", [False, True])
def test_presets_give_the_official_learning_rate_of_every_epoch(protocol: str, file: str, quarter: bool):
    official = facts("S3_sgd")["lr_schedules_by_official_code"][file]
    official = next((v for k, v in official.items() if "quarter" in k), None) if quarter else official
    if official is None:
        pytest.fail("the record has no quarter-epoch schedule for this file")
    training = preset_for(protocol, shots=16, quarter_epochs=quarter).training
    assert training["num_train_epochs"] == official["max_epoch"]
    for epoch, rates in enumerate(official["lr_per_epoch_groups"]):
        groups = [training["learning_rate"]]
        if "vision_learning_rate" in training:
            groups.append(training["vision_learning_rate"])
        ours = [
            epoch_cosine(
                epoch,
                learning_rate=rate,
                num_epochs=training["num_train_epochs"],
                warmup_epochs=training["warmup_epochs"],
                warmup_rate=training.get("warmup_learning_rate", 0.0),
            )
            for rate in groups
        ]
        assert ours == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("name", ["16_shots_3_classes", "uneven_6_5_4", "random_10_of_bs4", "random_8_of_bs4"])
def test_batches_equal_the_official_draw(name: str):
    example = facts("S4_batches")["examples"][name]
    sampler = SkipTuningBatchSampler(
        example["labels"],
        batch_size=example["batch_size"],
        seed=0,
        composition="one_class" if example["mode"] == "batch_random" else "random",
        remainder="drop",
    )
    batches = list(sampler.draw(random.Random(example["python_seed"])))
    assert batches == example["batches"]
    assert len(sampler) == example["n_batches"]
    used = {index for batch in batches for index in batch}
    assert sorted(set(range(len(example["labels"]))) - used) == example["dropped"]


@pytest.mark.parametrize("name", ["class_smaller_than_batch", "random_too_few"])
def test_where_the_official_code_crashes_the_default_keeps_every_image(name: str):
    example = facts("S4_batches")["examples"][name]
    composition = "one_class" if example["mode"] == "batch_random" else "random"
    settings = {"batch_size": example["batch_size"], "seed": 0, "composition": composition}
    with pytest.raises(DataError, match="remainder='keep'"):
        SkipTuningBatchSampler(example["labels"], **settings, remainder="drop")
    sampler = SkipTuningBatchSampler(example["labels"], **settings)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(example["labels"])))
