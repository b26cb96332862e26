"""The comparison harness: two models on one set of class prompts."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import ClassNameError, PeftVLMError
from peft_vlm.experiments.compare import Experiment, LinearProbeLearner, Task, ZeroShot, chosen_learners
from peft_vlm.experiments.report import markdown_table
from tests.tiny import CONTEXT_LENGTH, clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer


def saved_clip(folder: Path, tokenizer: PreTrainedTokenizerBase, *, length: int = CONTEXT_LENGTH) -> str:
    """A model folder without weights: configuration, tokenizer and image processor."""
    config = tiny_clip().config
    config.text_config.max_position_embeddings = length
    for part in (config, tokenizer, clip_processor()):
        part.save_pretrained(folder)
    return str(folder)


def test_two_models_that_read_one_set_of_prompts_need_one_vocabulary(tmp_path: Path) -> None:
    """The student's own rows would be scored on other words than it was asked for."""
    vocabulary = tiny_tokenizer().get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    student = saved_clip(tmp_path / "student", tiny_tokenizer())
    other = saved_clip(tmp_path / "other", CLIPTokenizer(vocab=vocabulary, merges=[]))
    with pytest.raises(ClassNameError, match=r"2 of 514 tokens differ: 'a' has the id \d+ in '.*student' and \d+ in"):
        Experiment.for_clip(student, text_model=other, augmentation={}, output_dir=tmp_path)


def test_the_shorter_text_tower_sets_the_length(tmp_path: Path) -> None:
    """A prompt that fits the teacher alone would fail in the middle of a run."""
    student = saved_clip(tmp_path / "student", tiny_tokenizer(), length=12)
    teacher = saved_clip(tmp_path / "teacher", tiny_tokenizer())
    experiment = Experiment.for_clip(student, text_model=teacher, augmentation={}, output_dir=tmp_path)
    assert experiment.max_length == 12
    assert experiment.prompts(["red", "blue"], "a {}.").input_ids.shape == (2, 8)
    with pytest.raises(ClassNameError, match="limit of the text tower is 12"):
        experiment.prompts(["hippopotamus"], "a {}.")


def test_the_report_has_the_first_task_on_top_and_the_others_below(tmp_path: Path) -> None:
    """The form that `metrics.json` promises; a learner that no seed changes runs once and is listed for every seed."""
    folder = saved_clip(tmp_path / "clip", tiny_tokenizer())
    tiny_clip().save_pretrained(folder)
    experiment = Experiment.for_clip(folder, augmentation={}, output_dir=tmp_path / "out", use_cpu=True)
    train, test = (ImageClassificationDataset(colour_rows(n, seed=n), colour_names()) for n in (4, 2))
    protocols = {"icons": "base_to_new", "emoji": "few_shot"}
    tasks = [Task(name, kind, train, test, template="a {}.", shots=2) for name, kind in protocols.items()]
    learners = [ZeroShot(), LinearProbeLearner(EvalTransform(clip_processor()))]
    report = experiment.run(tasks, learners, [1, 2])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    assert report["seeds"] == [1, 2]
    assert report["task"] == "icons"
    assert list(report["tasks"]) == ["emoji"]
    first, second = report["methods"], report["tasks"]["emoji"]["methods"]
    assert list(first) == list(second) == ["zero_shot", "linear_probe"]
    costs = {"seconds", "peak_memory_mb", "trainable_parameters"}
    assert {"base", "new", "h"} | costs <= set(first["zero_shot"])
    assert {"accuracy"} | costs <= set(second["zero_shot"])
    assert len(set(first["zero_shot"]["base"])) == 1
    assert (first["linear_probe"]["new"], first["linear_probe"]["h"]) == (None, None)
    for row in (*first.values(), *second.values()):
        assert all(len(values) == 2 for values in row.values() if isinstance(values, list))
    assert second["linear_probe"]["trainable_parameters"] == 6 * 16 + 6
    assert "| linear probe |" in markdown_table(report).partition("### emoji")[2]


def test_a_row_that_does_not_exist_is_refused_before_anything_runs() -> None:
    """A misspelt name would end in an empty table."""
    rows = [ZeroShot(), LinearProbeLearner(EvalTransform(clip_processor()))]
    assert [row.name for row in chosen_learners(rows, ["linear_probe"])] == ["linear_probe"]
    assert chosen_learners(rows, None) == rows
    with pytest.raises(PeftVLMError, match=r"among \['zero_shot', 'linear_probe'\], got \['Linear Probe'\]"):
        chosen_learners(rows, ["zero_shot", "Linear Probe"])
