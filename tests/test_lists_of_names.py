"""A text where a list of names belongs is refused everywhere; read letter by letter, "cat" is the classes c, a, t."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset as HFDataset

from peft_vlm import CoOpConfig, PromptedClassifier
from peft_vlm.data import (
    ImageClassificationDataset,
    ImageQuestionDataset,
    ImageStream,
    load_unlabelled_images,
    open_stream,
)
from peft_vlm.evaluation.classify import TextClassifier
from peft_vlm.evaluation.mllm import count_scores, exact_match, yes_no_scores
from peft_vlm.experiments.compare import chosen_learners
from peft_vlm.experiments.run import named_values
from peft_vlm.export import export_classifier, plain_classifier, write_export
from peft_vlm.settings import EvaluationArguments, RunSettings
from peft_vlm.text import tokenize_classes
from peft_vlm.text.answers import answer_token_ids, tokenize_candidates
from peft_vlm.text.prompts import tokenize_for_model
from tests.tiny import clip_processor, noise_image, tiny_clip, tiny_tokenizer

ROWS = [{"image": np.zeros((4, 4, 3), np.uint8), "label": 0}]
TABLE = HFDataset.from_dict({"image": [0], "label": [0]})


def classifier(**options: object) -> PromptedClassifier:
    """A tiny classifier."""
    return PromptedClassifier(tiny_clip(), tiny_tokenizer(), clip_processor(), **options)


def plain(names: object) -> object:
    """A tiny exported classifier."""
    return plain_classifier(tiny_clip(), torch.eye(16)[:2], names, image_processor=clip_processor())


def evaluation(**changes: object) -> EvaluationArguments:
    """Settings of an evaluation."""
    return EvaluationArguments(**{"protocol": "zero-shot", "dataset": ["d"], "output_dir": "o"} | changes)


CASES: dict[str, Callable[[Path], object]] = {
    "ImageClassificationDataset": lambda _: ImageClassificationDataset(ROWS, "cat"),
    "ImageQuestionDataset": lambda _: ImageQuestionDataset(ROWS, "cat", question="what?"),
    "ImageStream": lambda _: ImageStream(TABLE.to_iterable_dataset(), "cat", num_images=1),
    "load_unlabelled_images": lambda folder: load_unlabelled_images(folder, "cat"),
    "open_stream": lambda _: open_stream(TABLE, columns="label"),
    "with_class_names": lambda _: ImageClassificationDataset(ROWS, ["c", "a"]).with_class_names("cat"),
    "tokenize_classes": lambda _: tokenize_classes(tiny_tokenizer(), "cat", template="a {}.", max_length=77),
    "tokenize_for_model": lambda _: tokenize_for_model(tiny_clip(), tiny_tokenizer(), "cat", template="a {}."),
    "tokenize_candidates": lambda _: tokenize_candidates(tiny_tokenizer(), "cat"),
    "answer_token_ids": lambda _: answer_token_ids(tiny_tokenizer(), "cat"),
    "exact_match": lambda _: exact_match("ab", ["a", "b"]),
    "yes_no_scores": lambda _: yes_no_scores(["yes"], "y"),
    "count_scores": lambda _: count_scores("12", ["1", "2"]),
    "TextClassifier": lambda _: TextClassifier(tiny_clip(), tiny_tokenizer(), template="a {}.").logits_for("cat"),
    "PromptedClassifier": lambda _: classifier(class_names="cat"),
    "predict": lambda _: classifier().predict(noise_image(4, 4), class_names="cat"),
    "export_classifier": lambda _: export_classifier(None, base_model="x", class_names="cat"),
    "plain_classifier": lambda _: plain("cat"),
    "write_export": lambda folder: write_export(plain(["cat", "dog"]), folder, "onnx"),
    "PlainClassifier.predict": lambda _: plain(["cat", "dog"]).predict("photo.png"),
    "chosen_learners": lambda _: chosen_learners([], "zero_shot"),
    "named_values": lambda _: named_values("depth=3", "config"),
    "EvaluationArguments.dataset": lambda _: evaluation(dataset="d").check(),
    "EvaluationArguments.split": lambda _: evaluation(split="test").check(),
    "EvaluationArguments.template": lambda _: evaluation(template="a {}.").check(),
    "RunSettings": lambda _: RunSettings(method="m", model="m", dataset="d", config="depth=3").check(),
    "CoOpConfig": lambda _: CoOpConfig(num_text_tokens=2, class_names="cat"),
    "CoOpConfig.modules_to_save": lambda _: CoOpConfig(num_text_tokens=2, modules_to_save="logit_scale"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_text_is_no_list(name: str, tmp_path: Path) -> None:
    """Labels c, a, t without a word are the worst of all answers."""
    assert len(CASES) >= 28
    noise_image(4, 4).save(tmp_path / "1.png")
    with pytest.raises((ValueError, TypeError), match="(?i)expected .*(list|brackets)"):
        CASES[name](tmp_path)
