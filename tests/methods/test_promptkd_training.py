"""PromptKD's teachers and training runs: cached views, several teachers, images without labels, agreement, resume."""

import json

import pytest
import torch
from peft import get_peft_model_state_dict
from torch.testing import assert_close

from peft_vlm import PromptKDObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data import TrainTransform, load_unlabelled_images
from peft_vlm.data.dataset import collate
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.evaluation import TextClassifier, base_to_new
from peft_vlm.methods.promptkd.objective import Agreement
from tests.cases import class_prompts, images
from tests.methods.promptkd_models import NAMES, augmented, fresh, teacher
from tests.tiny import clip_processor, tiny_tokenizer


def train(folder, objective, dataset, *, epochs: int = 4, resume=None, model=None, **settings):
    """A short run; trainer and final tensors."""
    torch.manual_seed(3)
    model = fresh() if model is None else model
    options = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    args = VLMTrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, use_cpu=True, disable_tqdm=True, **(options | settings)
    )
    trainer = VLMTrainer(model, args, train_dataset=dataset, objective=objective)
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


def test_teachers_are_neither_trained_nor_saved_nor_in_training_mode(tmp_path):
    guide = teacher().train()
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    trainer, state = train(tmp_path, PromptKDObjective(class_prompts(), teacher=guide), images(), epochs=1)
    assert not guide.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert not any(guide is module for module in trainer.model.modules())
    assert sum(tensor.numel() for tensor in state.values()) < 3_000


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
        VLMTrainer(fresh(), trainer.args, train_dataset=dataset, eval_dataset=dataset, objective=objective)
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


def with_cached_views(folder, **settings):
    """Three epochs on two views."""
    options = {"teacher_cache": "views", "num_views": 2, "seen_classes": NAMES[:2]}
    objective = PromptKDObjective(class_prompts(), teacher=teacher(), **options)
    return train(folder, objective, augmented(), epochs=3, save_steps=3, **settings)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder, trainer and tensors of a run with cached views that never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, *with_cached_views(folder)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_run_with_cached_views_repeats_itself(tmp_path, straight, step: int):
    """Tensors and the agreement of every epoch, of the interrupted one and of one that was over but not logged."""
    folder, uninterrupted, expected = straight
    resumed, tensors = with_cached_views(tmp_path, resume=str(folder / f"checkpoint-{step}"))
    assert uninterrupted.state.global_step == resumed.state.global_step == 18
    assert all(torch.equal(expected[key], tensors[key]) for key in expected)
    agreements = [
        [entry for entry in run.state.log_history if any(key.startswith("agreement") for key in entry)]
        for run in (uninterrupted, resumed)
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
