"""PromptKD's teachers and training runs: cached views, several teachers, images without labels, agreement, resume."""

import json

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.testing import assert_close

from peft_vlm import PromptKDConfig, PromptKDObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data import TrainTransform, load_unlabelled_images
from peft_vlm.data.dataset import collate
from peft_vlm.errors import ClassNameError, DataError, PeftVLMError
from peft_vlm.evaluation import TextClassifier, base_to_new
from peft_vlm.methods.promptkd import Teacher
from peft_vlm.methods.promptkd.agreement import Agreement
from peft_vlm.text import encode_classes
from peft_vlm.text.prompts import tokenize_for_model
from tests.cases import TEACHER_DIM, base_model, class_prompts, images, pixels
from tests.tiny import clip_processor, colour_names, siglip_processor, tiny_clip, tiny_siglip, tiny_tokenizer

NAMES = list(colour_names())


def fresh(**settings):
    """A student with fixed initial values."""
    torch.manual_seed(0)
    config = PromptKDConfig(**({"class_dim": TEACHER_DIM, "vision_depth": 2, "num_vision_tokens": 2} | settings))
    return get_peft_model(base_model(), config)


def teacher(seed: int = 5, dim: int = TEACHER_DIM) -> torch.nn.Module:
    return tiny_clip(seed=seed, dim=dim)


def augmented(per_class: int = 4):
    """Images under random crops."""
    return images(per_class).with_transform(TrainTransform(clip_processor()))


def train(folder, objective, dataset, *, epochs: int = 4, resume=None, model=None, **settings):
    """A short run; trainer and final tensors."""
    torch.manual_seed(3)
    model = fresh() if model is None else model
    options = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    args = VLMTrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, use_cpu=True, disable_tqdm=True, **(options | settings)
    )
    trainer = VLMTrainer(model, objective, args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, get_peft_model_state_dict(model)


class Forwards:
    """Counts the images that a model's vision tower has seen."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.images = 0
        model.vision_model.embeddings.register_forward_hook(self.count)

    def count(self, module, args, output) -> None:
        """Hook."""
        self.images += len(output)


def test_cached_views_train_like_the_same_views_uncached(tmp_path):
    """Epochs 2 and 3 repeat the views 0 and 1, and the teacher runs on neither again."""
    cached_teacher, plain_teacher = teacher(), teacher()
    forwards, plain = Forwards(cached_teacher), Forwards(plain_teacher)
    cached = PromptKDObjective(class_prompts(), teacher=cached_teacher, teacher_cache="views", num_views=2)
    uncached = PromptKDObjective(class_prompts(), teacher=plain_teacher)
    original = uncached.prepare
    uncached.prepare = lambda m, d: (original(m, d), d.repeat_views(2))
    first, one = train(tmp_path / "a", cached, augmented(), logging_steps=1)
    second, two = train(tmp_path / "b", uncached, augmented(), logging_steps=1)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (first, second)]
    assert len(losses[0]) == 24
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key in one:
        assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)
    assert forwards.images == 2 * 24
    assert plain.images == 4 * 24


def test_views_differ_and_come_back():
    dataset, objective = (
        augmented(),
        PromptKDObjective(class_prompts(), teacher=teacher(), teacher_cache="views", num_views=2),
    )
    model = fresh()
    objective.prepare(model, dataset)
    seen = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        objective.epoch_start(model, dataset, epoch)
        seen.append((dataset[3]["pixel_values"], objective.cache.read(torch.tensor([3]))))
        expected = objective.teachers.features(seen[-1][0][None], dataset.transform)
        assert_close(seen[-1][1], expected, rtol=0, atol=1e-6)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][0], seen[2][0])
    assert torch.equal(seen[1][1], seen[3][1])


def test_the_disk_cache_holds_what_the_ram_cache_holds(tmp_path):
    dataset, rows = augmented(), []
    for options in ({"cache_storage": "ram"}, {"cache_storage": "disk", "cache_folder": tmp_path}):
        objective = PromptKDObjective(
            class_prompts(), teacher=teacher(), teacher_cache="views", num_views=3, **options
        )
        objective.prepare(fresh(), dataset)
        for epoch in range(3):
            objective.epoch_start(fresh(), dataset, epoch)
        rows.append(objective.cache.store.rows.clone())
    assert torch.equal(*rows)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == rows[0].numel() * 4 == 3 * 24 * TEACHER_DIM * 4


def test_the_cache_announces_its_size(capsys):
    objective = PromptKDObjective(class_prompts(), teacher=teacher(), teacher_cache="views", num_views=500)
    objective.prepare(fresh(), augmented())
    objective.epoch_start(fresh(), augmented(), 0)
    assert "view 1 of 500 (1.1 MB in ram)" in capsys.readouterr().err


def test_fixed_pixels_need_one_view_only():
    objective = PromptKDObjective(class_prompts(), teacher=teacher(), teacher_cache="views", num_views=4)
    objective.prepare(fresh(), images())
    for epoch in range(3):
        objective.epoch_start(fresh(), images(), epoch)
    assert objective.cache.store.rows.shape == (24, TEACHER_DIM)


def test_teachers_are_neither_trained_nor_saved_nor_in_training_mode(tmp_path):
    guide = teacher().train()
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    trainer, state = train(tmp_path, PromptKDObjective(class_prompts(), teacher=guide), images(), epochs=1)
    assert not guide.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert not any(guide is module for module in trainer.model.modules())
    assert sum(tensor.numel() for tensor in state.values()) < 3_000


def test_the_student_cannot_teach_itself():
    model = fresh()
    with pytest.raises(PeftVLMError, match="Load it a second time"):
        PromptKDObjective(class_prompts(), teacher=model.get_base_model()).prepare(model, images())


def test_class_vectors_are_those_of_the_weights_at_preparation():
    """Computed at construction they would be those of a teacher whose weights are loaded later."""
    guide, model = teacher(seed=1), fresh()
    objective = PromptKDObjective(class_prompts(), teacher=guide)
    guide.load_state_dict(teacher(seed=5).state_dict())
    objective.prepare(model, images())
    assert torch.equal(encode_classes(model, class_prompts()), encode_classes(teacher(seed=5), class_prompts()))


def test_a_half_precision_teacher_keeps_its_type():
    guide, model, dataset = teacher().to(torch.bfloat16), fresh(), images()
    objective = PromptKDObjective(class_prompts(), teacher=guide)
    objective.prepare(model, dataset)
    output = objective(model.train(), collate([dataset[i] for i in range(6)]))
    assert next(guide.parameters()).dtype == torch.bfloat16
    assert output.loss.dtype == output.logits.dtype == torch.float32
    assert objective.teachers.classes[0].dtype == torch.float32


def test_several_teachers_are_averaged_and_the_first_gives_the_vectors():
    guides = [teacher(5), teacher(6, dim=20)]
    dataset, alone = images(), []
    for guide in guides:
        single = PromptKDObjective(class_prompts(), teacher=guide)
        single.teachers.prepare(class_prompts(), torch.device("cpu"))
        alone.append(single.teachers.logits(single.teachers.features(pixels(), None)))
    for weighting in ("equal", "confidence"):
        model = fresh()
        objective = PromptKDObjective(class_prompts(), teacher=guides, teacher_weighting=weighting)
        objective.prepare(model, dataset)
        together = objective.teachers.logits(objective.teachers.features(pixels(), None))
        if weighting == "equal":
            assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-5)
        else:
            sure = torch.stack([logits.softmax(dim=-1).amax(dim=-1, keepdim=True) for logits in alone])
            expected = (sure[0] * alone[0] + sure[1] * alone[1]) / sure.sum(dim=0)
            assert_close(together, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(encode_classes(model, class_prompts()), encode_classes(guides[0], class_prompts()))


def test_a_teacher_of_another_family_with_its_own_tokenizer_and_pixels():
    """SigLIP: bidirectional text of full length, another mean and standard deviation."""
    guide = tiny_siglip()
    prompts = tokenize_for_model(guide, tiny_tokenizer(), NAMES, template="a {}.")
    wrapped = Teacher(guide, prompts=prompts, image_processor=siglip_processor(), name="siglip")
    model, dataset = fresh(class_dim=32), images()
    objective = PromptKDObjective(class_prompts(), teacher=wrapped)
    objective.prepare(model, dataset)
    transform = dataset.transform
    raw = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (transform.image_mean, transform.image_std))
    found = wrapped.image_features((raw - mean) / std, transform)
    with torch.no_grad():
        expected = guide.get_image_features(pixel_values=(raw - 0.5) / 0.5).pooler_output
    assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert model.active_peft_config.teacher_name_or_path == "siglip"
    with pytest.raises(ClassNameError, match="6 classes"):
        PromptKDObjective(class_prompts(NAMES[:5] + ["pink"]), teacher=wrapped).prepare(fresh(class_dim=32), dataset)


def test_another_image_size_needs_the_teachers_processor():
    config = teacher().config
    config.vision_config.image_size = 32
    large = type(teacher())(config).eval()
    with pytest.raises(DataError, match=r"32 pixels, the student's have 16.*image_processor"):
        Teacher(large).image_features(pixels(), None)
    assert Teacher(large, image_processor=clip_processor(32)).image_features(pixels(), None).shape == (4, TEACHER_DIM)


def test_agreement_counts_by_the_teachers_class():
    agreement = Agreement(["a", "b_c", "d"], ["b c", "a"])
    agreement.start(0)
    said = torch.eye(3)[[0, 1, 2, 2, 0]]
    agreement.add(torch.eye(3)[[0, 2, 2, 1, 0]], said)
    assert agreement.metrics() == {"agreement_seen": pytest.approx(200 / 3), "agreement_unseen": 50.0}
    agreement.start(1)
    assert agreement.metrics() == {}
    with pytest.raises(ClassNameError, match=r"\['e'\]"):
        Agreement(["a", "b"], ["a", "e"])


def test_agreement_reaches_log_and_reports(tmp_path):
    """Recounted from the logits of the last epoch."""
    objective = PromptKDObjective(class_prompts(), teacher=teacher(), seen_classes=NAMES[:3], transductive=False)
    outputs, original = [], objective.agreement.add
    objective.agreement.add = lambda s, t: (outputs.append((s.detach(), t)), original(s, t))
    trainer, _ = train(tmp_path, objective, images(), epochs=2)
    student_says, teacher_says = (torch.cat(part).argmax(dim=-1) for part in zip(*outputs[-6:], strict=True))
    assert len(teacher_says) == 24
    logged = [entry for entry in trainer.state.log_history if any(key.startswith("agreement") for key in entry)]
    assert len(logged) == 2
    for name, chosen in (("seen", teacher_says < 3), ("unseen", teacher_says >= 3)):
        if bool(chosen.any()):
            expected = 100 * (student_says == teacher_says)[chosen].float().mean().item()
            assert logged[-1][f"agreement_{name}"] == pytest.approx(expected)
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert any(key.startswith("agreement") for key in summary["metrics"])
    assert summary["objective"]["transductive"] is False
    assert summary["objective"]["training_images"]["images"] == 24
    assert summary["objective"]["seen_classes"] == NAMES[:3]


def test_a_folder_without_labels_trains(tmp_path):
    """Nested folders whose names mean nothing; no accuracy is reported, for there is none."""
    source = images()
    for index in range(0, 24, 2):
        path = tmp_path / "pool" / f"part{index % 3}" / "deep" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(index).save(path)
    (tmp_path / "pool" / ".hidden.png").write_bytes(b"")
    (tmp_path / "pool" / "notes.txt").write_text("no image")
    dataset = load_unlabelled_images(tmp_path / "pool", NAMES, transform=TrainTransform(clip_processor()))
    assert dataset.labels == [-1] * 12
    objective = PromptKDObjective(class_prompts(), teacher=teacher())
    trainer, _ = train(tmp_path / "run", objective, dataset, epochs=1, per_device_train_batch_size=11, logging_steps=1)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2  # the second batch holds one image, which BatchNorm alone cannot normalise
    assert not any("accuracy" in entry for entry in losses)
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["objective"]["training_images"] == {
        "images": 12,
        "with_label": 0,
        "classes_with_labelled_images": [],
    }
    with pytest.raises(DataError, match="with labels"):
        VLMTrainer(fresh(), objective, trainer.args, train_dataset=dataset, eval_dataset=dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No images"):
        load_unlabelled_images(tmp_path / "empty", NAMES)
    with pytest.raises(DataError, match="no folder"):
        load_unlabelled_images(tmp_path / "nowhere", NAMES)


def test_labels_change_nothing(tmp_path):
    dataset, other = images(), images()
    other.labels = [0] * len(other)
    _, first = train(tmp_path / "a", PromptKDObjective(class_prompts(), teacher=teacher()), dataset, epochs=1)
    _, second = train(tmp_path / "b", PromptKDObjective(class_prompts(), teacher=teacher()), other, epochs=1)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("step", [3, 8])
def test_a_resumed_run_with_cached_views_repeats_itself(tmp_path, step: int):
    """Tensors and the agreement of the interrupted epoch."""

    def objective() -> PromptKDObjective:
        return PromptKDObjective(
            class_prompts(), teacher=teacher(), teacher_cache="views", num_views=2, seen_classes=NAMES[:2]
        )

    straight, first = train(tmp_path / "a", objective(), augmented(), epochs=3, save_steps=step)
    checkpoint = str(tmp_path / "a" / f"checkpoint-{step}")
    resumed, second = train(tmp_path / "b", objective(), augmented(), epochs=3, save_steps=step, resume=checkpoint)
    assert straight.state.global_step == resumed.state.global_step == 18
    assert all(torch.equal(first[key], second[key]) for key in first)
    agreements = [
        [entry for entry in run.state.log_history if any(key.startswith("agreement") for key in entry)]
        for run in (straight, resumed)
    ]
    assert len(agreements[0]) == 3
    assert agreements[0] == agreements[1]


def test_base_to_new_on_a_trained_student(tmp_path):
    """Both halves by class names; the scores follow from the student's own logits."""
    model = fresh()
    train(tmp_path, PromptKDObjective(class_prompts(), teacher=teacher()), images(), epochs=1, model=model)
    test = images(per_class=2, seed=7)
    result = base_to_new(TextClassifier(model, tiny_tokenizer(), template="a {}."), test)
    with torch.no_grad():
        batch = collate([test[i] for i in range(len(test))])
        logits = model.eval()(pixel_values=batch["pixel_values"]).logits_per_image
    for part, columns in (("base", slice(0, 3)), ("new", slice(3, 6))):
        rows = [i for i, label in enumerate(test.labels) if columns.start <= label < columns.stop]
        expected = logits[rows][:, columns].argmax(dim=-1).tolist()
        assert result.parts[part].predicted.tolist() == expected


def test_learning_approaches_the_teacher(tmp_path):
    """The reason for all of it, on random images of random models: the loss falls and the agreement rises."""
    objective = PromptKDObjective(class_prompts(), teacher=teacher(seed=11))
    settings = {"learning_rate": 0.02, "save_strategy": "no", "logging_steps": 4, "per_device_train_batch_size": 12}
    trainer, _ = train(tmp_path, objective, images(8), epochs=20, **settings)
    history = trainer.state.log_history
    loss = [entry["loss_distillation"] for entry in history if "loss_distillation" in entry]
    agreement = [entry["agreement_seen"] for entry in history if "agreement_seen" in entry]
    assert len(loss) == len(agreement) == 20
    assert loss[-1] < loss[0] / 2
    assert agreement[-1] > agreement[0]


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"reduction": "mean"}, "'official', 'batchmean'"),
        ({"teacher_cache": "ram"}, "'none', 'views'"),
        ({"teacher_weighting": "best"}, "'equal', 'confidence'"),
        ({"cache_storage": "tape"}, "'ram', 'disk'"),
        ({"temperature": 0}, "`temperature` above 0"),
        ({"num_views": 0}, "`num_views` above 0"),
        ({"teacher": []}, "at least one `teacher`"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptKDObjective(class_prompts(), **({"teacher": teacher()} | settings))
