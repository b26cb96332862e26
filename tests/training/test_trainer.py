"""What the trainer asks of datasets and objectives: columns, collators, optimizers, class names."""

import ast
import copy
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Trainer

from peft_vlm import CoOpConfig, CoOpObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.errors import DataError, PeftVLMError
from peft_vlm.training.checkpoints import damage
from peft_vlm.training.trainer import PRIVATE_NAMES
from tests.cases import WORD_A, base_model, class_prompts, images
from tests.short_run import train as train_short
from tests.tiny import colour_names

#: Whose attributes are those of the trainer, in its methods and in callbacks.
OWNERS = ("self", "trainer", "super()")
CLASS_ATTRIBUTES = {"__module__", "__doc__", "__firstlineno__", "__static_attributes__"}


class WithColumn(CoOpObjective):
    """CoOp that remembers the values of a further column."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, image_cache="none", **kwargs)
        self.seen: list[float] = []
        self.seen_in_evaluation: list[float] = []

    def __call__(self, model, batch):
        """Loss as ever."""
        self.seen += batch["weight"].tolist()
        return super().__call__(model, batch)

    def predict(self, model, batch):
        """Logits as ever."""
        self.seen_in_evaluation += batch["weight"].tolist()
        return super().predict(model, batch)


class OwnUpdate(CoOpObjective):
    """CoOp by plain gradient descent at a tenth of the rate."""

    def optimizer(self, model, *, learning_rate):
        """The update rule."""
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate / 10)


def weighted(dataset, weight: float):
    """The dataset with a collator that adds a column."""
    plain = dataset.collate
    dataset.collate = lambda items: plain(items) | {"weight": torch.full((len(items),), weight)}
    return dataset


def trainer_of(objective, folder, *, model=None, arguments=None, **settings) -> VLMTrainer:
    model = model or get_peft_model(base_model(), CoOpConfig(context_init_ids=WORD_A))
    options = {"num_train_epochs": 1, "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True}
    options |= {"warmup_epochs": 0, "save_strategy": "no"} | (arguments or {})
    args = VLMTrainingArguments(output_dir=str(folder), **options)
    return VLMTrainer(model, args, **({"train_dataset": images(per_class=1)} | settings), objective=objective)


def test_a_batch_may_have_any_columns_and_each_dataset_makes_its_own(tmp_path):
    """With one collator for both, validation questions would be written as training questions are."""
    objective = WithColumn(class_prompts())
    train, validation = weighted(images(per_class=1), 0.5), weighted(images(per_class=1, seed=9), 2.0)
    trainer = trainer_of(objective, tmp_path, train_dataset=train, eval_dataset=validation)
    trainer.train()
    trainer.evaluate()
    assert objective.seen == [0.5] * 6
    assert objective.seen_in_evaluation == [2.0] * 6
    assert trainer.get_train_dataloader().collate_fn([train[0]])["weight"].tolist() == [0.5]


def test_an_objective_may_bring_its_own_optimizer(tmp_path):
    """The schedule then sets the rate of that optimizer."""
    trainer = trainer_of(OwnUpdate(class_prompts()), tmp_path)
    trainer.create_optimizer()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.001]
    assert trainer.optimizer.param_groups[0]["momentum"] == 0  # not that of the arguments
    assert trainer.create_optimizer() is trainer.optimizer
    trainer = trainer_of(CoOpObjective(class_prompts()), tmp_path)
    trainer.create_optimizer()
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("length", [{"num_train_epochs": 1}, {"num_train_epochs": 5, "max_steps": 2}])
def test_a_run_that_never_leaves_its_warm_up_is_refused(tmp_path, length):
    """Every step at the warm-up rate of 1e-5 trains nothing, and the log looks like that of any other run."""
    options = {"warmup_epochs": 1, "per_device_train_batch_size": 3} | length
    trainer = trainer_of(CoOpObjective(class_prompts()), tmp_path, arguments=options)
    with pytest.raises(
        PeftVLMError, match="got 1 epoch and `warmup_epochs`=1: .* rate 1e-05.* set `warmup_epochs` to 0"
    ):
        trainer.train()
    assert VLMTrainingArguments(str(tmp_path), use_cpu=True).warmup_epochs == 0


@pytest.mark.plots
def test_a_short_run_has_a_training_curve(tmp_path):
    """With a line of log per 500 steps, the curve of most runs on few labelled images would be an empty image."""
    trainer = trainer_of(CoOpObjective(class_prompts()), tmp_path, arguments={"num_train_epochs": 3})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == trainer.state.max_steps >= 3
    assert (tmp_path / "training_curve.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (list(colour_names())[::-1], r"6 names for 6, the first difference at label 0: \['purple'\] for \['red'\]"),
        ([*colour_names(), "grey"], r"7 names for 6, the first difference at label 6: \['grey'\] for \[\]"),
    ],
)
def test_validation_images_of_other_classes_are_refused(tmp_path, names, message):
    """Labels of one class list compared with predictions over another give a plausible, wrong accuracy."""
    validation = images(per_class=1)
    validation.class_names = tuple(names)
    with pytest.raises(DataError, match=message):
        trainer_of(CoOpObjective(class_prompts()), tmp_path, eval_dataset=validation)


def test_underscores_in_class_names_do_not_count(tmp_path):
    """`readable` writes them as spaces in every prompt."""
    validation = images(per_class=1)
    validation.class_names = tuple(f"{name}_" for name in colour_names())
    trainer_of(CoOpObjective(class_prompts()), tmp_path, eval_dataset=validation)


def test_accumulated_batches_are_averaged(tmp_path):
    """Summed, they would train at a multiple of the learning rate, and the log would show a multiple of the loss."""
    outcomes = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        model = get_peft_model(base_model(), CoOpConfig(context_init_ids=WORD_A))
        args = VLMTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.01,
            warmup_epochs=0,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )
        result = VLMTrainer(model, args, train_dataset=images(), objective=CoOpObjective(class_prompts())).train()
        (context,) = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        outcomes.append((context, torch.tensor(result.training_loss)))
    assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-6)
    assert_close(outcomes[2], outcomes[0], rtol=1e-4, atol=1e-6)


def tensors_of(model, name: str) -> dict[str, torch.Tensor]:
    """Copies of an adapter's tensors."""
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}


@pytest.mark.parametrize("names", [["default"], ["mine"], ["default", "mine"]])
def test_the_best_checkpoint_is_loaded_under_the_adapters_own_name(tmp_path, names):
    """The Trainer itself would read `default`: another adapter's tensors, or none with a mere warning."""
    *others, active = names
    model = get_peft_model(base_model(), CoOpConfig(context_init_ids=WORD_A), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, CoOpConfig(context_init_ids=WORD_A))
        model.set_adapter(name)
    before = {name: tensors_of(model, name) for name in names}
    arguments = {"num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "epoch", "save_total_limit": None}
    # the loss falls, so that the highest one is that of the first epoch
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    validation = images(per_class=1, seed=9)
    trainer = trainer_of(
        CoOpObjective(class_prompts()), tmp_path, model=model, arguments=arguments | best, eval_dataset=validation
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1] > losses[2]
    folder = tmp_path / "checkpoint-2" / ("" if active == "default" else active)
    stored, final = load_file(folder / "adapter_model.safetensors"), tensors_of(model, active)
    assert final.keys() == stored.keys()
    assert all(torch.equal(final[key], stored[key]) for key in stored)
    assert not any(torch.equal(final[key], before[active][key]) for key in final)
    for name in others:
        assert all(torch.equal(before[name][key], tensor) for key, tensor in tensors_of(model, name).items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_loss_terms_reach_tensorboard(tmp_path):
    """`report_to` hands every term on, as it does for W&B and trackio."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = {"report_to": "tensorboard", "logging_steps": 1}
    trainer_of(CoOpObjective(class_prompts()), tmp_path, arguments=arguments).train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0])).Reload()
    assert {"train/loss", "train/loss_cross_entropy", "train/learning_rate"} <= set(events.Tags()["scalars"])


def test_a_run_says_how_it_goes(tmp_path, capsys) -> None:
    """A launcher that starts one process instead of two shows here, and nowhere else."""
    train_short(tmp_path, "coop", save_strategy="no", disable_tqdm=False, max_steps=7, learning_rate=0.02)
    printed = capsys.readouterr().err
    assert "Training in 1 process on cpu: 4 images per step (4 per process, 1 accumulated), 7 steps to go." in printed
    assert "Epoch 1 of 2: loss " in printed
    assert " images/s, " in printed
    assert " left, peak memory " in printed


#: What fails when transformers changes a private name that the trainer relies on.
TESTS_OF_PRIVATE_NAMES = {
    "_get_dataloader": "test_a_batch_may_have_any_columns_and_each_dataset_makes_its_own",
    "_save_checkpoint": "test_a_run_does_not_change_the_users_dataset_and_leaves_whole_checkpoints",
    "_load_from_checkpoint": "test_a_resumed_adapter_is_the_saved_one",
    "_load_best_model": "test_the_best_checkpoint_is_loaded_under_the_adapters_own_name",
    "_created_lr_scheduler": "test_a_second_training_has_a_new_schedule",
}


def test_the_trainer_overrides_little_of_the_base_class() -> None:
    """Each override is a place where a new version of transformers may differ without an error."""
    ours = [cls for cls in VLMTrainer.__mro__ if cls.__module__.startswith("peft_vlm")]
    overridden = {name for cls in ours for name in vars(cls) if name in vars(Trainer)} - CLASS_ATTRIBUTES
    assert len(overridden) <= 12, sorted(overridden)
    source = inspect.getsource(inspect.getmodule(Trainer))
    private = {name for cls in (Trainer,) for name in vars(cls)} | set(re.findall(r"self\.(_[a-z]\w*)", source))
    folder = Path(inspect.getsourcefile(VLMTrainer)).parent
    tree = ast.parse("\n".join(path.read_text() for path in sorted(folder.glob("*.py"))))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value).endswith(OWNERS)}
    used |= {name for cls in ours for name in vars(cls)}
    assert {name for name in used & private if re.match("_[a-z]", name)} == set(PRIVATE_NAMES)
    assert set(PRIVATE_NAMES) == set(TESTS_OF_PRIVATE_NAMES)
    assert len(PRIVATE_NAMES) <= 5
    assert set(TESTS_OF_PRIVATE_NAMES.values()) <= set(globals())


def test_a_run_does_not_change_the_users_dataset_and_leaves_whole_checkpoints(tmp_path) -> None:
    """A dataset that was trained on would show another augmentation, or hide damaged images, ever after."""
    dataset = images(per_class=2)
    dataset.set_epoch(7)
    before = {key: copy.copy(value) for key, value in vars(dataset).items()}
    arguments = {"num_train_epochs": 2, "save_strategy": "epoch", "unreadable_images": "skip"}
    trainer = trainer_of(CoOpObjective(class_prompts()), tmp_path, train_dataset=dataset, arguments=arguments)
    trainer.train()
    assert vars(dataset).keys() == before.keys()
    assert dataset.epoch == 7
    assert not dataset.unreadable.are_skipped
    assert all(vars(dataset)[key] is value for key, value in before.items() if isinstance(value, str | int | tuple))
    assert trainer.images.epoch == 1
    assert trainer.images.source is dataset.source, "the view shares the images"
    found = sorted(tmp_path.glob("**/checkpoint-*"))
    assert [damage(folder) for folder in found] == [[], []]
    assert not list(tmp_path.glob(".*")), "nothing of the folders that were written aside"
    state = json.loads((found[-1] / "trainer_state.json").read_text())
    assert state["global_step"] == trainer.state.global_step


def test_a_resumed_adapter_is_the_saved_one(tmp_path) -> None:
    """The base class would look for weights of the whole module, or take a fresh adapter."""
    arguments = {"num_train_epochs": 1, "save_strategy": "epoch"}
    first = trainer_of(CoOpObjective(class_prompts()), tmp_path, arguments=arguments)
    first.train()
    again = trainer_of(CoOpObjective(class_prompts()), tmp_path, arguments=arguments)
    again.train(resume_from_checkpoint=True)
    assert again.first_step == again.state.global_step == first.state.global_step, "no step was left"
    states = [get_peft_model_state_dict(trainer.model.model) for trainer in (first, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_second_training_has_a_new_schedule(tmp_path) -> None:
    """It would begin where the cosine of the first one ended, at a rate near 0."""
    trainer = trainer_of(
        CoOpObjective(class_prompts()), tmp_path, arguments={"num_train_epochs": 2, "logging_steps": 1}
    )
    trainer.train()
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(0.01)
