"""The experiment of one prompt on several models, where its example does not reach."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_vlm import TVPConfig
from peft_vlm.evaluation import PromptEffect, TransferReport
from peft_vlm.experiments import transfer
from peft_vlm.experiments.transfer import ImageTextModel, TransferExperiment, Variant, write_transfer_results
from tests.tiny import clip_processor
from tests.tiny_questions import colour_questions, tiny_llava


def test_models_are_measured_on_the_device_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer moves the source alone; the others would answer on the processor beside an idle GPU."""
    questions = colour_questions(1)
    members = [ImageTextModel(name, tiny_llava(seed=seed), questions.collator) for seed, name in enumerate("ab")]

    def wrap(member: ImageTextModel) -> torch.nn.Module:
        return get_peft_model(member.model, TVPConfig.for_processor(clip_processor(), canvas_size=32, border=5))

    wrap(ImageTextModel("c", tiny_llava(), questions.collator)).save_pretrained(tmp_path)
    moves = []
    monkeypatch.setattr(transfer, "_move", lambda model, device: moves.append((model, str(device))))
    experiment = TransferExperiment(
        members,
        train=lambda seed: questions,
        test=questions,
        output_dir=tmp_path,
        wrap=wrap,
        objective=lambda *args: None,
        score=lambda model, dataset: float(len(moves)),
    )
    experiment._device = torch.device("cuda", 0)
    report = experiment.measure(Variant("tvp"), 1, tmp_path, {})
    assert moves == [(member.model, device) for member in members for device in ("cuda:0", "cpu")]
    assert [effect.prompted for effect in report.effects.values()] == [1.0, 3.0], "measured between the two moves"


def test_a_variant_without_unseen_models_leaves_the_tables_of_all(tmp_path: Path) -> None:
    """The comparison alone is left out; hours of training are not lost for it."""
    effects = {name: PromptEffect(1.0, 2.0, 3.0) for name in ("a", "b")}
    one, both = (TransferReport("colours", sources, effects, seed=1) for sources in (("a",), ("a", "b")))
    table = write_transfer_results({"one": [one], "both": [both]}, tmp_path)
    assert "mean of 1 unseen" in table
    assert "### both" in table
    assert "### comparison" not in table
    assert "### comparison" in write_transfer_results({"one": [one], "again": [one]}, tmp_path)
