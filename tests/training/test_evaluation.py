"""What evaluation within the trainer gives: the metrics of a user, all images, any data set."""

import numpy as np
import pytest
import torch

from peft_vlm import CoOpObjective
from tests.cases import class_prompts, images
from tests.training.test_trainer import trainer_of


def trainer(folder, **settings):
    data = {"train_dataset": images(per_class=1), "eval_dataset": images(per_class=3, seed=9)}
    return trainer_of(CoOpObjective(class_prompts()), folder, **(data | settings))


def accuracy(prediction) -> dict[str, float]:
    """As every example of transformers has it."""
    return {"own": 100.0 * float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def test_metrics_of_a_user_get_logits(tmp_path) -> None:
    """Class ids in their place look like a row of scores, and `argmax` is then the class of one image."""
    own, default = trainer(tmp_path, compute_metrics=accuracy), trainer(tmp_path)
    default.model.load_state_dict(own.model.state_dict())
    expected, found = default.evaluate(), own.evaluate()
    assert found["eval_own"] == pytest.approx(expected["eval_accuracy"])
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"])
    assert "eval_accuracy" not in found
    logits = default.predict(default.eval_dataset).predictions
    assert logits.shape == (18, 6)
    assert np.array_equal(logits, own.predict(own.eval_dataset).predictions)
    losses = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(own.eval_dataset.labels))
    assert expected["eval_loss"] == pytest.approx(float(losses), rel=1e-6)


def test_metrics_by_batch_and_own_predictions_work_as_in_transformers(tmp_path) -> None:
    """`batch_eval_metrics` and `preprocess_logits_for_metrics` are the user's."""
    calls: list[tuple[int, bool]] = []

    def by_batch(prediction, compute_result: bool) -> dict[str, float]:
        calls.append((len(prediction.label_ids), compute_result))
        return {"images": sum(count for count, _ in calls)} if compute_result else {}

    arguments = {"batch_eval_metrics": True, "per_device_eval_batch_size": 5}
    found = trainer(tmp_path, compute_metrics=by_batch, arguments=arguments).evaluate()
    assert calls == [(5, False), (5, False), (5, False), (3, True)]
    assert found["eval_images"] == 18
    assert found["eval_loss"] == pytest.approx(trainer(tmp_path).evaluate()["eval_loss"])

    def top(prediction) -> dict[str, float]:
        return {"own": 100.0 * float((prediction.predictions == prediction.label_ids).mean())}

    settings = {"compute_metrics": top, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    found = trainer(tmp_path, **settings).evaluate()
    assert found["eval_own"] == pytest.approx(trainer(tmp_path).evaluate()["eval_accuracy"])
    assert found["eval_loss"] == pytest.approx(trainer(tmp_path).evaluate()["eval_loss"], rel=1e-5)


def test_an_evaluation_that_was_broken_off_leaves_nothing(tmp_path) -> None:
    """Its batches would count in the next one."""
    own = trainer(tmp_path, arguments={"per_device_eval_batch_size": 5})
    expected = own.evaluate()

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    handle = own.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        own.evaluate()
    handle.remove()
    own.metrics._losses.append(torch.full((3,), 100.0))
    assert own.evaluate()["eval_loss"] == expected["eval_loss"]


@pytest.mark.parametrize("count", [7, 3])
def test_evaluation_drops_no_batch(tmp_path, count: int) -> None:
    """`dataloader_drop_last` is about training: of seven images in batches of four, four would be scored."""
    arguments = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4, "per_device_train_batch_size": 2}
    own = trainer(tmp_path, arguments=arguments, eval_dataset=images(per_class=3).select(range(count)))
    assert len(own.predict(own.eval_dataset).predictions) == count
    logits = torch.tensor(own.predict(own.eval_dataset).predictions)
    right = (logits.argmax(-1) == torch.tensor(own.eval_dataset.labels)).float().mean()
    assert own.evaluate()["eval_accuracy"] == pytest.approx(100 * float(right))


def test_another_dataset_is_evaluated_also_with_workers_that_live_on(tmp_path) -> None:
    """The base class keeps the loader of the first one, and would score that again."""
    arguments = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    own = trainer(tmp_path, arguments=arguments)
    first, second = own.evaluate(), own.evaluate(images(per_class=2, seed=5))
    assert second["eval_loss"] != first["eval_loss"]
    assert second["eval_loss"] == trainer(tmp_path, eval_dataset=images(per_class=2, seed=5)).evaluate()["eval_loss"]
