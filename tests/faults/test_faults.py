"""What goes wrong in the middle of a run: NaN, damaged images, dying workers, too little memory, Ctrl-C."""

import json
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from peft_vlm import VLMTrainer
from peft_vlm.errors import DataError, PeftVLMError
from peft_vlm.training.callbacks import MAX_IN_A_ROW, with_advice
from peft_vlm.training.checkpoints import damage
from tests import forked
from tests.short_run import parts, train

UNCACHED = {"settings": {"image_cache": "none"}, "save_strategy": "no", "warmup_epochs": 0}
DAMAGED = 5


def spoil(*positions: int, gradient_only: bool = False, offset: float = 0.0):
    """Make loss and gradient, the gradient alone or, by an offset, the loss alone bad for batches with some images."""

    def change(model: Any, objective: Any, dataset: Any) -> None:
        plain = type(objective).__call__

        class Spoiled(type(objective)):
            """The objective, with NaN for some images."""

            def __call__(self, model, batch):
                """A loss."""
                output = plain(self, model, batch)
                if set(positions) & set(batch["index"].tolist()):
                    for name, term in output.loss_terms.items():
                        if offset:
                            output.loss_terms[name] = term + offset
                        elif gradient_only:
                            term.register_hook(lambda gradient: gradient * float("nan"))
                        else:
                            output.loss_terms[name] = term * float("nan")
                return output

        objective.__class__ = Spoiled

    return change


def context_of(trainer: Any) -> torch.Tensor:
    """The trained tensor of CoOp."""
    (context,) = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    return context


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_stops_the_run_and_names_its_images(tmp_path: Path, gradient_only: bool) -> None:
    """One such step makes every weight NaN, and the file that is written looks like any other."""
    what = "gradient" if gradient_only else r"loss, got \{'loss': nan"
    with pytest.raises(FloatingPointError, match=rf"finite {what}.* at step \d .*index \[.*\b5\b.*'skip'"):
        train(tmp_path, "coop", change=spoil(DAMAGED, gradient_only=gradient_only), **UNCACHED)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_can_be_left_out(tmp_path: Path, gradient_only: bool) -> None:
    """No update, no momentum, no weight decay; and the log has the number."""
    options = UNCACHED | {"non_finite": "skip", "num_train_epochs": 3}
    trainer = train(tmp_path, "coop", change=spoil(DAMAGED, gradient_only=gradient_only), **options)
    assert context_of(trainer).isfinite().all()
    text = (tmp_path / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert metrics["final"]["skipped_steps"] == 3  # one per epoch
    assert len([entry for entry in metrics["history"] if "accuracy" in entry]) == 15, "18 steps less 3"
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert metrics["final"]["train_loss"] == pytest.approx(sum(losses) / 15)
    everything = train(tmp_path, "coop", change=spoil(*range(24)), **(options | {"num_train_epochs": 1}))
    fresh = parts("coop")[0]
    assert torch.equal(context_of(everything), next(p for p in fresh.parameters() if p.requires_grad))


def test_many_steps_left_out_in_a_row_stop_the_run(tmp_path: Path) -> None:
    """Weights that are broken make every step NaN: hours of nothing."""
    with pytest.raises(FloatingPointError, match=f"at step {MAX_IN_A_ROW} "):
        train(tmp_path, "coop", change=spoil(*range(24)), **(UNCACHED | {"non_finite": "skip"}))


def damage_images(*positions: int):
    """Replace images by files that are cut off."""

    def change(model: Any, objective: Any, dataset: Any) -> None:
        rows = [dict(row) for row in dataset.source]
        for position in positions:
            rows[position]["image"] = b"\x89PNG\r\n\x1a\n cut off"
        dataset.source = rows

    return change


def test_a_damaged_image_stops_the_run_by_name(tmp_path: Path) -> None:
    """The default: nothing is left out that the user does not know of."""
    with pytest.raises(DataError, match="image 5 .*cannot be read as an image"):
        train(tmp_path, "coop", change=damage_images(DAMAGED), **UNCACHED)


@pytest.mark.parametrize("method", ["coop", "skip_tuning", "tvp_questions"])
def test_a_damaged_image_can_be_left_out(tmp_path: Path, method: str) -> None:
    """The next image of its class takes its place, in caches too, so batches keep their size and their classes."""
    options = {"save_strategy": "no", "unreadable_images": "skip", "num_train_epochs": 1}
    trainer = train(tmp_path, method, change=damage_images(4, DAMAGED), **options)
    dataset = trainer.images
    neighbour = next(p for p in (6, 7, 0, 1, 2, 3) if dataset.labels[p] == dataset.labels[DAMAGED])
    item, other = dataset[DAMAGED], dataset[neighbour]
    assert item["index"] == DAMAGED
    assert item["labels"] == other["labels"] == dataset.labels[DAMAGED]
    if method == "coop":
        assert torch.equal(item["pixel_values"], other["pixel_values"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["final"]["unreadable_images"] == 2
    assert dataset.unreadable.rows == [4, DAMAGED]
    assert trainer.train_dataset.unreadable.rows == [], "the user's dataset stays as it is"


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    """Images of another class would be taught under its name."""
    options = {"save_strategy": "no", "unreadable_images": "skip"}
    with pytest.raises(DataError, match="readable image of each class"):
        train(tmp_path, "coop", change=damage_images(4, 5, 6, 7), **options)


class DyingTransform:
    """A transform at which the process ends, as under the system's out-of-memory killer."""

    def __init__(self, plain: Any) -> None:
        self.plain, self.parent = plain, os.getpid()
        self.image_size, self.image_mean, self.image_std = plain.image_size, plain.image_mean, plain.image_std

    def __call__(self, image, generator):
        """Pixels in the main process, an end elsewhere."""
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.plain(image, generator)


def let_workers_die(model: Any, objective: Any, dataset: Any) -> None:
    """Every worker ends at its first image."""
    dataset.transform = DyingTransform(dataset.transform)


def test_a_dying_worker_is_named_with_what_to_do(tmp_path: Path) -> None:
    """torch says `exited unexpectedly`, and not what a user can do about it."""
    with pytest.raises(PeftVLMError, match=r"died: DataLoader worker.*`dataloader_num_workers` \(now 1\)"):
        train(tmp_path, "coop", change=let_workers_die, dataloader_num_workers=1, **UNCACHED)


def train_with_little_memory(folder: str) -> None:
    """A run that asks for more memory than the system gives."""

    def greedy(model: Any, objective: Any, dataset: Any) -> None:
        objective.epoch_start = lambda *arguments: torch.empty(2**40)

    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
    train(folder, "coop", change=greedy, **(UNCACHED | {"settings": {"image_cache": "ram"}}))


def test_too_little_memory_says_what_to_lower(tmp_path: Path) -> None:
    """The allocator's message has a number of bytes and no way out."""
    log = tmp_path / "log.txt"
    assert forked.wait(forked.start(log, train_with_little_memory, str(tmp_path)), log) == 1
    text = log.read_text()
    assert "MemoryError" in text
    assert "`per_device_train_batch_size=2` with `gradient_accumulation_steps=2` (now 4 and 1)" in text
    assert "`gradient_checkpointing=True`" in text
    assert "`bf16=True`" in text
    assert "the objective's `image_cache='ram'` holds features" in text


def test_other_errors_keep_their_message() -> None:
    """Advice about memory for an unrelated error sends people the wrong way."""
    args = SimpleNamespace(per_device_train_batch_size=1)
    with pytest.raises(RuntimeError, match="^shapes do not fit$"), with_advice(args, {}):
        raise RuntimeError("shapes do not fit")
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")
    args = SimpleNamespace(
        **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "activation_checkpointing": True},
        **{"bf16": True, "fp16": False, "dataloader_num_workers": 4},
    )
    with pytest.raises(MemoryError, match=r"^CUDA out of memory.*=4` with `gradient_accumulation_steps=4`"):
        with with_advice(args, {}):
            raise cuda
    with pytest.raises(PeftVLMError, match=r"DataLoader worker \(pid 7\).*now 4"), with_advice(args, {}):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


class SignalAtStep(TrainerCallback):
    """Sends a signal to its own process within a step."""

    def __init__(self, number: int, step: int, *, rank: int = 0) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """In the middle of an epoch."""
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), self.number)


def interrupted(folder: str, number: int, rank: int = 0) -> None:
    """A run that would write no checkpoint, and gets a signal in its fourth step."""
    train(folder, "coop", callbacks=(SignalAtStep(number, 3, rank=rank),), save_strategy="no")


class SignalAtImage:
    """A transform that sends a signal when it is given its n-th image, and counts them."""

    def __init__(self, transform: Any, number: int) -> None:
        self.transform, self.number, self.seen = transform, number, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the transform gives."""
        self.seen += 1
        if self.seen == self.number:
            os.kill(os.getpid(), signal.SIGINT)
        return self.transform(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transform, name)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (3, "before step 1, while the objective prepared it; nothing was written"),
        (27, "before step 7, while the objective prepared it; the last checkpoint is as it was"),
    ],
)
def test_an_interrupt_while_features_are_stored_ends_within_a_batch(tmp_path: Path, number: int, message: str) -> None:
    """Ctrl-C was taken for one within a step, and heard ten minutes later."""
    transforms = []

    def change(model: Any, objective: Any, dataset: Any) -> None:
        transforms.append(SignalAtImage(dataset.transform, number))
        dataset.transform = transforms[0]

    settings = {"cache_batch_size": 2, "image_cache": "ram"}
    with pytest.raises(KeyboardInterrupt, match=message):
        train(tmp_path, "skip_tuning", change=change, settings=settings, data={"augmented": True}, save_steps=6)
    assert transforms[0].seen <= number + 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"] * (number > 24)
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


class SignalAtTheEnd(TrainerCallback):
    """Sends Ctrl-C when no step is left."""

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Before the final files are written."""
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_after_the_last_step_ends_the_script(tmp_path: Path) -> None:
    """A script of several runs would go on with the next one."""
    with pytest.raises(KeyboardInterrupt, match="the run had finished and its results are written"):
        train(tmp_path, "coop", callbacks=(SignalAtTheEnd(),), **UNCACHED)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "metrics.json").is_file()


def train_with_scaler(folder: Path, **options: Any) -> Any:
    """A short run under a loss scaler, as fp16 on a GPU has one."""
    original = VLMTrainer.__init__

    def with_scaler(trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLMTrainer, "__init__", with_scaler)
        return train(folder, "coop", **(UNCACHED | options))


def test_a_scaler_that_leaves_out_every_step_stops_the_run(tmp_path: Path) -> None:
    """It would end as a success, its weights as they were."""
    message = "got 31 steps in a row that the loss scaler left out"
    with pytest.raises(FloatingPointError, match=message):
        train_with_scaler(tmp_path, change=spoil(*range(24), gradient_only=True), num_train_epochs=8)


def test_under_a_scaler_a_step_without_a_finite_loss_is_left_out(tmp_path: Path) -> None:
    """The scaler looks at gradients alone, which may be finite."""
    trainer = train_with_scaler(
        tmp_path, change=spoil(*range(24), offset=float("inf")), non_finite="skip", num_train_epochs=1
    )
    fresh = next(p for p in parts("coop")[0].parameters() if p.requires_grad)
    assert torch.equal(context_of(trainer), fresh)
    assert json.loads((tmp_path / "metrics.json").read_text())["final"]["skipped_steps"] == 6
    plain = train_with_scaler(tmp_path / "plain", num_train_epochs=1)
    assert not torch.equal(context_of(plain), fresh)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupt_finishes_the_step_and_writes_a_checkpoint(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C would lose what came after the last checkpoint; a batch system's notice of its end likewise."""
    log = tmp_path / "log.txt"
    assert forked.wait(forked.start(log, interrupted, str(tmp_path), number), log) == code
    assert "Stopped after step 4 of 12; checkpoint-4 is in" in log.read_text()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not damage(tmp_path / "checkpoint-4")
    assert not (tmp_path / "adapter_model.safetensors").exists()  # no final files: the run has not ended
    assert len(list(tmp_path.glob(".*"))) == 0
    log.unlink()
    forked.run(log, train, str(tmp_path), "coop", resume="auto", save_strategy="no")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_callers_signal_handlers_come_back(tmp_path: Path) -> None:
    """A notebook would never stop again by Ctrl-C."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(FloatingPointError):
        train(tmp_path, "coop", change=spoil(DAMAGED), **UNCACHED)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
