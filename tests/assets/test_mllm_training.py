"""The training script of the multimodal models: learns, resumes exactly, exports what the Auto classes load."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_questions import COLOURS, Questions, QuestionTokens, draw_images
from peft_vlm.data.question_collator import QuestionCollator
from peft_vlm.data.questions import ImageQuestionDataset
from pretraining_data import load_smoke
from run_log import RunLog
from train_mllm import Training, prepare, run

BATCH = 8
FAMILIES = ("llava", "idefics3", "paligemma")


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    """Training sets the threads of the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def tiny_run(family: str, *, steps: int) -> Training:
    """A tiny language model behind the student's vision tower, on the committed icon shots."""
    arguments = Namespace(
        smoke=True, corpus=None, family=family, images=steps * BATCH, minutes=None, seed=0, threads=1
    )
    training = prepare(arguments)
    training.recipe.batch_size, training.recipe.warmup_steps = BATCH, 4
    return training


@pytest.mark.parametrize("family", FAMILIES)
def test_smoke_training_learns_and_exports(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path from drawings to a folder whose model and processor answer a question."""
    monkeypatch.setattr(RunLog, "every", 5)
    log = run(tiny_run(family, steps=20), tmp_path, checkpoint_minutes=10)
    assert len(log.entries) == 4
    assert log.entries[-1]["loss"] < log.entries[0]["loss"] - 1.0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    collator = QuestionCollator(AutoProcessor.from_pretrained(tmp_path / "model"))
    rows = [{"image": np.zeros((48, 48, 3), dtype=np.uint8), "answer": "airplane"}]
    questions = ImageQuestionDataset(rows, question="what is this?", answer_column="answer", collator=collator)
    batch = questions.collate([questions[0]])
    tokens = QuestionTokens(collator.processor)
    trained = tokens.batch(["what is this?"], ["airplane"])
    assert torch.equal(batch["input_ids"], trained["input_ids"])  # users ask exactly as the model was trained
    assert torch.equal(batch["token_labels"], trained["labels"])
    inputs = {name: batch[name] for name in batch if name not in ("labels", "index", "token_labels")}
    with torch.inference_mode():
        assert torch.isfinite(model(**inputs).logits).all()


def test_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Six steps in one go, or three and a fresh start."""
    straight = tiny_run("llava", steps=6)
    run(straight, tmp_path / "straight", checkpoint_minutes=10)
    first = tiny_run("llava", steps=6)
    for step in range(3):
        first.train_step(step / 6)
    (tmp_path / "resumed").mkdir()
    first.save_checkpoint(tmp_path / "resumed" / "checkpoint.pt", RunLog(6, BATCH))
    second = tiny_run("llava", steps=6)
    run(second, tmp_path / "resumed", checkpoint_minutes=10)
    assert second.step == 6
    for name, tensor in straight.optimiser.masters.items():
        assert torch.equal(tensor, second.optimiser.masters[name]), name


def test_questions_have_the_right_answers() -> None:
    """A yes belongs to the image's own name, a colour to the ink that was drawn."""
    data = load_smoke()
    questions = Questions(data.table, seed=0)
    indices = np.arange(len(data))
    asked, answers, coloured = questions.draw(indices)
    kinds = {"yes": 0, "no": 0}
    for index, question, answer in zip(indices, asked, answers, strict=True):
        name = data.table["name"][index]
        if answer in kinds:
            kinds[answer] += 1
            assert (f" {name}?" in question) == (answer == "yes")
    assert min(kinds.values()) > 0
    rgba, monochrome = data.pixels(indices)
    generator = torch.Generator().manual_seed(0)
    pixels, names = draw_images(
        rgba, monochrome, torch.ones(len(data), dtype=torch.bool), size=48, generator=generator
    )
    assert pixels.shape == (len(data), 3, 48, 48)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    red = [row for row, name in enumerate(names) if name == "red"]
    strength = (pixels[:, 0] - pixels[:, 1:].amax(dim=1)).flatten(1).amax(dim=1)
    assert set(names) == set(COLOURS)
    assert float(strength[red].min()) > 0.3
    assert any(coloured)
