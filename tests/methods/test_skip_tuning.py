"""Skip Tuning's equations by hand-computed numbers, its caches, its settings, and its documented deviations."""

import logging
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import SkipTuningObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data.dataset import collate
from peft_vlm.data.feature_store import RowStore
from peft_vlm.errors import AdapterError
from peft_vlm.losses import num_top_classes, rank_classes, rank_keep_probability, selected_classes
from peft_vlm.methods.skip_tuning.objective import SkipTuningBatchSampler, preset_for
from peft_vlm.text.prompts import tokenize_classes
from tests.cases import CASES as ALL_CASES
from tests.cases import augmented, class_prompts, images, perturb, prepared, skip_tuning_config
from tests.tiny import CONTEXT_LENGTH, tiny_clip, tiny_tokenizer

(CASE,) = [case for case in ALL_CASES if case.method == "skip_tuning"]


@pytest.mark.parametrize(
    ("classes", "ratio", "cap", "expected"),
    [
        (40, 0.5, 50, 20),
        (40, 0.5, 8, 8),
        (40, 12, 50, 12),
        (41, 0.5, 50, 21),
        (40, 1.0, 8, 40),
        (7, 12, 50, 7),
        (100, 0.05, 50, 5),
    ],
)
def test_number_of_top_classes(classes, ratio, cap, expected):
    assert num_top_classes(classes, top_ratio=ratio, max_top=cap) == expected


def test_keep_probability_by_hand():
    """Six classes, two on top: tail ranks at 0, 5/3, 10/3 and 5, density exp(-x / 0.3), min-max normalised."""
    probability = rank_keep_probability(6, 2, tail_scale=0.3)
    density = [math.exp(-x / 0.3) for x in (0, 5 / 3, 10 / 3, 5)]
    expected = [1.0, 1.0] + [(d - density[-1]) / (density[0] - density[-1]) for d in density]
    assert probability.tolist() == pytest.approx(expected, rel=1e-6)
    assert probability[2] == 1.0
    assert probability[-1] == 0.0


def test_a_single_tail_rank_is_kept_where_the_official_code_divides_by_zero():
    assert rank_keep_probability(40, 39, tail_scale=0.3).tolist() == [1.0] * 40


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_tail_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=r"`tail_scale` > 0"):
        rank_keep_probability(10, 5, tail_scale=scale)


@pytest.mark.parametrize("settings", [{"top_ratio": 0, "max_top": 50}, {"top_ratio": 0.5, "max_top": 0}])
def test_top_settings_must_be_positive(settings):
    with pytest.raises(ValueError, match=r"`top_ratio` > 0 and `max_top` >= 1"):
        num_top_classes(10, **settings)


def test_ranking_by_hand():
    """Own labels come first even where another class is more similar; the others by their best image."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    prototypes = torch.tensor([[0.8, 0.6], [0.0, -1.0], [0.6, 0.8], [-1.0, 0.0]])
    ranked = rank_classes(image, prototypes, torch.tensor([1, 1]))
    assert ranked.tolist()[0] == 1
    assert set(ranked.tolist()[1:3]) == {0, 2}
    assert ranked.tolist()[3] == 3


def test_labels_beyond_the_top_ranks_are_kept():
    """The official code drops the label and trains the image towards class 0."""
    ranked = torch.tensor([3, 1, 0, 2])
    keep_rank = torch.tensor([True, False, False, False])
    assert selected_classes(ranked, keep_rank, torch.tensor([1, 2])).tolist() == [1, 2, 3]


def fresh(**settings):
    return get_peft_model(tiny_clip(), skip_tuning_config(**settings))


def loss_of(model, dataset, **settings) -> torch.Tensor:
    objective = prepared(CASE, model, dataset, **settings)
    return objective(model, collate([dataset[i] for i in (0, 7, 14, 21)])).loss


def test_cached_features_equal_the_plain_path():
    model = fresh()
    perturb(model)
    dataset = images()
    cached = loss_of(model, dataset, image_cache="ram", top_ratio=1)
    plain = loss_of(model, dataset, image_cache="none", top_ratio=1)
    assert_close(cached, plain, rtol=1e-5, atol=1e-6)
    logits = model(
        pixel_values=torch.stack([dataset[i]["pixel_values"] for i in (0, 7, 14, 21)]),
        input_ids=class_prompts().input_ids,
    ).logits_per_image
    labels = torch.tensor([dataset.labels[i] for i in (0, 7, 14, 21)])
    assert_close(cached, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)


def test_the_disk_cache_holds_what_the_ram_cache_holds(tmp_path):
    model, dataset = fresh(), images()
    ram = prepared(CASE, model, dataset, image_cache="ram").cache.store.rows
    disk = prepared(CASE, model, dataset, image_cache="disk", cache_folder=tmp_path)
    assert torch.equal(ram, disk.cache.store.rows)
    assert f"{tmp_path}/peft_vlm_cache_" in Path("/proc/self/maps").read_text()
    assert len(list(tmp_path.rglob("*.bin"))) == 0  # open, but without a name: a killed run leaves nothing


def test_the_cache_announces_its_size(caplog):
    with caplog.at_level(logging.INFO):
        RowStore("ram", name="hidden states").allocate((1024, 4, 64), torch.float32)
    assert "hidden states: 1024 x 4 x 64 numbers = 1.0 MB in ram" in caplog.text


def test_an_empty_cache_is_an_error():
    with pytest.raises(AdapterError, match="Call `epoch_start`"):
        RowStore("ram", name="hidden states").read(torch.tensor([0]), torch.device("cpu"))


def test_lower_layers_run_once_per_image_and_epoch_and_without_autograd():
    """Official extraction runs every image through the whole network; anything repeated here would cost as much."""
    model, dataset = fresh(), images()
    calls: list[tuple[int, bool]] = []
    layer = model.get_base_model().vision_model.encoder.layers[0]
    layer.register_forward_hook(lambda _, args, output: calls.append((len(args[0]), output.requires_grad)))
    objective = prepared(CASE, model, dataset, cache_batch_size=10)
    for start in range(0, 24, 4):
        objective(model, collate([dataset[i] for i in range(start, start + 4)])).loss.backward()
    assert sum(size for size, _ in calls) == len(dataset)
    assert not any(grad for _, grad in calls)


@pytest.mark.parametrize(
    ("random", "settings", "expected"),
    [
        (False, {}, [24, 0, 0, 0]),
        (True, {}, [4, 4, 4, 4]),
        (True, {"image_cache": "ram"}, [24, 24, 24, 24]),
        (True, {"num_views": 2}, [24, 24, 0, 0]),
    ],
)
def test_lower_layers_run_again_only_for_new_pixels(random, settings, expected):
    """A store that is filled anew in each epoch costs what it saves; one that is never filled is stale."""
    model, dataset = fresh(), augmented() if random else images()
    sizes: list[int] = []
    layer = model.get_base_model().vision_model.encoder.layers[0]
    objective = CASE.objective(class_prompts(), **settings)
    objective.prepare(model, dataset)
    layer.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    seen, losses = [], []
    for epoch in range(4):
        sizes.clear()
        dataset.set_epoch(epoch)
        objective.epoch_start(model, dataset, epoch)
        losses.append(objective(model, collate([dataset[i] for i in range(4)])).loss.item())
        seen.append(sum(sizes))
    assert seen == expected
    assert (losses[0] == losses[1]) != random
    if "num_views" in settings:
        assert losses[:2] == losses[2:]


@pytest.mark.parametrize(("num_views", "cache"), [(0, "auto"), (True, "auto"), (2, "none")])
def test_views_that_nothing_stores_are_refused(num_views, cache):
    with pytest.raises(ValueError, match="num_views"):
        CASE.objective(class_prompts(), num_views=num_views, image_cache=cache)


def test_lower_text_layers_run_once_per_run():
    model, dataset = fresh(), images()
    calls: list[int] = []
    layer = model.get_base_model().text_model.encoder.layers[0]
    layer.register_forward_hook(lambda _, args, output: calls.append(len(args[0])))
    objective = prepared(CASE, model, dataset)
    for epoch in (1, 2):
        objective.epoch_start(model, dataset, epoch)
    assert calls == [6]


def test_text_is_cut_to_the_longest_kept_prompt():
    names = ["a", "b", "c", "a name that is much longer"]
    prompts = tokenize_classes(tiny_tokenizer(), names, template="{}", max_length=CONTEXT_LENGTH)
    model = fresh()
    lengths: list[int] = []
    layer = model.get_base_model().text_model.encoder.layers[1]
    objective = SkipTuningObjective(prompts, top_ratio=1, max_top=1, batch_composition="random", image_cache="none")
    dataset = images().restrict([0, 1, 2, 3])
    objective.prepare(model, dataset)
    objective.num_top = 1
    objective.keep_probability = torch.tensor([1.0, 0.0, 0.0, 0.0])
    layer.register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
    objective(model, collate([dataset[0]]))  # class "a": start, one letter, end
    assert lengths == [3]


@pytest.mark.parametrize("redraw", ["never", "epoch", "step"])
def test_when_the_tail_is_redrawn(redraw):
    model, dataset = fresh(), images()
    objective = prepared(CASE, model, dataset, redraw_tail=redraw)
    draws = [objective.tail_uniform.clone()]
    batch = collate([dataset[i] for i in (0, 7)])
    objective(model, batch)
    draws.append(objective.tail_uniform.clone())
    objective.epoch_start(model, dataset, 1)
    draws.append(objective.tail_uniform.clone())
    changed = [not torch.equal(a, b) for a, b in zip(draws, draws[1:], strict=False)]
    assert changed == {"never": [False, False], "epoch": [False, True], "step": [True, False]}[redraw]


def test_state_of_another_class_list_is_refused():
    objective = CASE.objective(class_prompts())
    other = CASE.objective(class_prompts(["red", "blue"]))
    with pytest.raises(ValueError, match="class names of the interrupted run"):
        objective.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"redraw_tail": "always"}, "'never', 'epoch', 'step'"),
        ({"image_cache": "gpu"}, "'ram', 'disk', 'none'"),
        ({"batch_composition": "mixed"}, "'one_class', 'random'"),
        ({"remainder": "pad"}, "'keep', 'drop'"),
    ],
)
def test_unknown_choices_list_the_known_ones(settings, message):
    with pytest.raises(ValueError, match=message):
        SkipTuningObjective(class_prompts(), **settings)


def test_a_template_ensemble_is_refused():
    prompts = tokenize_classes(tiny_tokenizer(), ["a", "b"], template=["{}", "the {}"], max_length=CONTEXT_LENGTH)
    with pytest.raises(ValueError, match="one template, got 2"):
        SkipTuningObjective(prompts)


def test_learning_rates_are_staged_by_tower(tmp_path):
    model, dataset = fresh(), images()
    args = VLMTrainingArguments(
        output_dir=str(tmp_path), learning_rate=2e-5, vision_learning_rate=5e-6, use_cpu=True, disable_tqdm=True
    )
    trainer = VLMTrainer(model, args, train_dataset=dataset, objective=CASE.objective(class_prompts()))
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(groups) == 2
    assert [group["lr"] for group in groups] == [2e-5, 5e-6]
    assert all(group["weight_decay"] == 5e-4 and group["momentum"] == 0.9 for group in groups)
    for group, expected in zip(groups, (False, True), strict=True):
        assert group["params"]
        assert all(("vision" in names[id(p)] or "visual" in names[id(p)]) == expected for p in group["params"])


def test_fewer_than_four_shots_use_random_batches():
    assert preset_for("few_shot", shots=2).objective["batch_composition"] == "random"
    assert preset_for("few_shot", shots=4).objective["batch_composition"] == "one_class"
    with pytest.raises(ValueError, match="base_to_new"):
        preset_for("zero_shot", shots=4)


def test_one_class_batches_use_every_image_each_epoch_in_another_order():
    labels = [0] * 6 + [1] * 5 + [2] * 3
    sampler = SkipTuningBatchSampler(labels, batch_size=4, seed=1, composition="one_class")
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 5
        assert all(len({labels[i] for i in batch}) == 1 for batch in batches)
        assert sorted(i for batch in batches for i in batch) == list(range(14))
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_adapter_is_kept_and_saved_in_the_chosen_dtype(dtype, tmp_path):
    from safetensors.torch import load_file

    model = fresh(adapter_dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 70
    assert {str(t.dtype).removeprefix("torch.") for t in stored.values()} == {dtype}


def test_towers_of_different_depth_have_their_own_start_layers():
    model = fresh(start_layer=1, text_start_layer=2)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any("text_model.encoder.layers.1." in name for name in names)
    assert any("vision_model.encoder.layers.1." in name for name in names)
