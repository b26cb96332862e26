"""The pretraining script learns, resumes exactly, grows models exactly; its parallel backward is the plain one."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from augment import augment
from clip_forward import ParallelTowers, contrastive_loss
from clip_model import build_model, grow
from optimiser import orthogonalise
from tests.source_tree import ROOT
from train_clip import Pretraining, prepare, run

STUDENT = ROOT / "examples" / "assets" / "clip_student"


def tiny_run(output: Path, *, pairs: int, workers: int = 2) -> Pretraining:
    """A tiny model on the committed icon shots."""
    options = dict.fromkeys(("muon_lr", "adam_lr", "constant_share", "emoji_repeats", "minutes"))
    arguments = Namespace(
        smoke=True,
        corpus=None,
        half=False,
        output=output,
        architecture="tiny",
        grow_from=None,
        pairs=pairs,
        batch_size=64,
        masked_share=0.0,
        seed=0,
        workers=workers,
        **options,
    )
    return prepare(arguments)


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    """Pretraining sets one thread per operation for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_smoke_training_lowers_the_loss_and_exports_a_model(tmp_path: Path) -> None:
    """The whole path from images to a folder that `CLIPModel` loads, on a few hundred steps."""
    log = run(tiny_run(tmp_path, pairs=120 * 64), tmp_path, checkpoint_minutes=10)
    losses = [entry["loss"] for entry in log.entries]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
    assert log.entries[-1]["accuracy"] > 1.3 * log.entries[0]["accuracy"]
    model, tokenizer = CLIPModel.from_pretrained(tmp_path / "model"), CLIPTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert (tmp_path / "training_curve.png").stat().st_size > 1000


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    """Order, captions, augmentation, momenta and master weights all go on where they were."""
    whole = tiny_run(tmp_path / "whole", pairs=640, workers=1)
    run(whole, tmp_path / "whole", checkpoint_minutes=10)
    first = tiny_run(tmp_path / "cut", pairs=640, workers=1)
    log = run_steps(first, tmp_path / "cut", steps=4)
    assert first.step == 4
    second = tiny_run(tmp_path / "cut", pairs=640, workers=1)
    run(second, tmp_path / "cut", checkpoint_minutes=10)
    assert log is not None
    assert second.step == whole.step == 10
    for name, master in whole.optimiser.masters.items():
        assert torch.equal(master, second.optimiser.masters[name]), name


def run_steps(training: Pretraining, output: Path, *, steps: int) -> object:
    """The first steps of a run, and its checkpoint."""
    from run_log import RunLog

    log = RunLog(training.recipe.steps, training.recipe.batch_size)
    for _ in range(steps):
        training.train_step(training.recipe.progress(training.step, 0.0))
    training.save_checkpoint(output / "checkpoint.pt", log)
    return log


def test_parallel_backward_gives_the_gradients_of_the_whole_batch() -> None:
    """The loss mixes all images with all captions, although each worker sees a part of them."""
    tokenizer = CLIPTokenizer.from_pretrained(STUDENT)
    model = build_model("tiny", tokenizer).train()
    pixels, token_ids = torch.randn(12, 3, 48, 48), torch.randint(0, 4000, (9, 6))
    token_ids[:, -1] = tokenizer.eos_token_id
    targets, results = torch.arange(12) % 9, []
    for workers in (1, 2):
        model.zero_grad()
        loss, _ = ParallelTowers(model, workers=workers).backward(pixels, None, token_ids, targets)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if "k_proj.bias" not in name}
        results.append((loss, gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-7)


def test_growing_keeps_the_function() -> None:
    """The deeper teacher starts as exactly the student."""
    tokenizer = CLIPTokenizer.from_pretrained(STUDENT)
    student = CLIPModel.from_pretrained(STUDENT, dtype=torch.float32).eval()
    teacher = grow(student, "teacher", tokenizer).eval()
    assert len(teacher.vision_model.encoder.layers) > len(student.vision_model.encoder.layers)
    inputs = tokenizer(["house", "a red car"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = [m(pixel_values=torch.ones(1, 3, 48, 48), **inputs).logits_per_image for m in (student, teacher)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_contrastive_loss_by_hand() -> None:
    """Two images of one caption share its text-to-image target."""
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss, logits = contrastive_loss(images, torch.eye(2), torch.tensor([0, 0, 1]), torch.tensor(1.0))
    to_text = float(torch.log(1 + torch.exp(torch.tensor(-1.0))))
    e = float(np.e)
    to_image = (np.log((2 * e + 1) / e) + np.log((e + 2) / e)) / 2
    assert logits.shape == (3, 2)
    assert float(loss) == pytest.approx((to_text + to_image) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_updates_have_singular_values_near_one(dtype: torch.dtype) -> None:
    """Muon's step treats every direction alike, for tall and wide matrices, in the precision of the training."""
    for shape in ((3, 16, 40), (2, 40, 16)):
        result = orthogonalise(torch.randn(shape).to(dtype))
        assert result.dtype == dtype
        values = torch.linalg.svdvals(result.float())
        assert 0.5 < float(values.min()) < float(values.max()) < 1.4


def test_augmentation_is_repeatable_and_does_not_mirror() -> None:
    """Arrows mean their direction; equal seeds must give equal batches for an exact resume."""
    rgba = torch.zeros(64, 48, 48, 4, dtype=torch.uint8)
    rgba[:, 12:36, 4:20, 3] = 255
    batches = [augment(rgba, torch.ones(64, dtype=torch.bool), torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(batches[0], batches[1])
    spread = batches[0].flatten(2).std(dim=2).mean(dim=1)
    assert float(spread.min()) > 0.05
    left_minus_right = (batches[0][..., :24].mean(dim=(1, 2, 3)) - batches[0][..., 24:].mean(dim=(1, 2, 3))).abs()
    assert float((left_minus_right > 0.05).float().mean()) > 0.9
