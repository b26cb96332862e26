"""What the trainer asks of datasets and objectives: columns, collators, optimizers, class names."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, CoOpObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.errors import DataError
from tests.cases import WORD_A, base_model, class_prompts, images
from tests.tiny import colour_names


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


def trainer_of(objective, folder, **settings) -> VLMTrainer:
    model = get_peft_model(base_model(), CoOpConfig(context_init_ids=WORD_A))
    options = {"num_train_epochs": 1, "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True}
    args = VLMTrainingArguments(output_dir=str(folder), warmup_epochs=0, save_strategy="no", **options)
    return VLMTrainer(model, objective, args, **({"train_dataset": images(per_class=1)} | settings))


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
        result = VLMTrainer(model, CoOpObjective(class_prompts()), args, train_dataset=images()).train()
        (context,) = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        outcomes.append((context, torch.tensor(result.training_loss)))
    assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-6)
    assert_close(outcomes[2], outcomes[0], rtol=1e-4, atol=1e-6)
