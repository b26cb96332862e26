"""Trainings on a stream: exact resume in mid-epoch, and what is refused."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from peft_vlm import RPPObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data import ImageStream
from peft_vlm.errors import DataError, PeftVLMWarning
from peft_vlm.training.inputs import check_evaluation, name_uneven_shards, train_loader
from tests.cases import base_model, class_prompts, rpp_config
from tests.short_run import parts
from tests.tiny_streams import stream, table, write_shards


def run_on(images: ImageStream, folder: Path, *, resume: Path | None = None, **arguments) -> dict[str, torch.Tensor]:
    """Train two epochs of four steps; the final tensors."""
    torch.manual_seed(1)
    model = get_peft_model(base_model(), rpp_config(vision_depth=0))
    own = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5, "save_total_limit": None}
    own |= {"use_cpu": True, "per_device_train_batch_size": 6, "disable_tqdm": True, "learning_rate": 0.1}
    args = VLMTrainingArguments(output_dir=str(folder), report_to="none", **(own | arguments))
    objective = RPPObjective(class_prompts(), soft_weight=0, num_sampled_classes=3)
    trainer = VLMTrainer(model, args, train_dataset=images, objective=objective)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.state.global_step == 8
    return get_peft_model_state_dict(model)


def test_a_training_on_a_stream_resumes_in_mid_epoch(tmp_path: Path):
    """Through the trainer, which throws the skipped batches away, and warns where it cannot see the same images."""
    shards = write_shards(tmp_path / "shards")
    straight, checkpoint = run_on(stream(shards), tmp_path / "a"), tmp_path / "a" / "checkpoint-5"
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftVLMWarning)
        resumed = run_on(stream(shards), tmp_path / "b", resume=checkpoint)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    changed = "dataloader_num_workers was 0 and is 2, stream_seed was 3 and is 4"
    with pytest.warns(PeftVLMWarning, match=f"sees other batches than it would have: {changed}"):
        run_on(stream(shards, seed=4), tmp_path / "c", resume=checkpoint, dataloader_num_workers=2)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("coop", {"image_cache": "ram"}, "got a stream, where no image has a position that comes again"),
        ("skip_tuning", {}, "got a stream, where no image has a position that comes again"),
        ("promptkd", {}, "got a stream, where no image has a position that comes again"),
        ("rpp", {"image_sampling": "balanced"}, r"load_image_stream\(..., images_per_class=16\)"),
        ("coop", {"image_cache": "none"}, None),
        ("coop", {}, None),
        ("promptsrc", {}, None),
    ],
)
def test_methods_that_need_positions_refuse_streams(tmp_path: Path, method: str, settings: dict, message: str | None):
    """An image cache by position would hold other images; balanced batches need the labels of all images."""
    model, objective, _ = parts(method, **settings)
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    images = stream(table(), num_images=64)
    if message is None:
        VLMTrainer(model, args, train_dataset=images, objective=objective).train()
        return
    with pytest.raises(DataError, match=message):
        VLMTrainer(model, args, train_dataset=images, objective=objective)


def test_validation_images_are_no_stream():
    """One that starts over has no accuracy."""
    _, objective, _ = parts("coop")
    with pytest.raises(DataError, match="`eval_dataset` with an end, got a stream"):
        check_evaluation(objective, stream(table()))


@pytest.mark.parametrize(
    ("shards", "processes", "workers", "message"),
    [
        (3, 1, 2, "2 workers cannot divide 3 shards evenly: some images come twice"),
        (3, 2, 0, "2 processes cannot divide 3 shards evenly, so each of them reads every row"),
        (12, 2, 4, "4 workers cannot divide 6 shards evenly"),
        (3, 1, 1, None),
        (12, 2, 3, None),
        (12, 4, 0, None),
    ],
)
def test_shards_that_cannot_be_divided_evenly_are_named(
    shards: int, processes: int, workers: int, message: str | None
):
    """By rows it costs time; by workers images come twice, or not at all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name_uneven_shards(shards, processes, workers)
    assert [str(warning.message)[: len(message or "")] for warning in caught] == ([message] if message else [])


def test_a_run_names_the_shards_that_its_workers_cannot_divide(tmp_path: Path):
    """The check stands where the loader is made."""
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=2, report_to="none")
    with pytest.warns(PeftVLMWarning, match="2 workers cannot divide 3 shards evenly"):
        train_loader(stream(table().to_iterable_dataset(num_shards=3)), parts("rpp")[1], args, batch_size=4)
