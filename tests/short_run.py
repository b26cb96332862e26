"""A short training of any method, for tests that interrupt it, resume it, or run it in several processes."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import TrainerCallback

from peft_vlm import (
    SkipTuningAnswerObjective,
    SkipTuningConfig,
    TVPConfig,
    TVPObjective,
    VLMTrainer,
    VLMTrainingArguments,
)
from peft_vlm.data import ImageQuestionDataset, QuestionCollator
from peft_vlm.data.transforms import TrainTransform
from peft_vlm.methods.tvp import ClipGuide
from tests.cases import CASES, base_model, class_prompts, images
from tests.tiny import clip_processor, colour_names, colour_rows, tiny_clip
from tests.tiny_questions import QUESTION, llava_processor, tiny_llava

#: Methods on multimodal models, beside those of `CASES`.
QUESTION_RUNS = ("tvp_questions", "skip_tuning_answers")
RUNS = (*(case.method for case in CASES), *QUESTION_RUNS)
#: Settings under which a method has the most to remember between two steps.
MEMORY = {
    "cpl": {"momentum": 0.5},
    "promptkd": {"teacher_cache": "views", "num_views": 2},
    "promptsrc": {"gpa_mean": 2.0, "gpa_std": 1.0},
    "skip_tuning": {"redraw_tail": "step", "batch_composition": "one_class"},
}


def parts(method: str, *, count: int = 24, augmented: bool = False, **settings: Any) -> tuple[Any, Any, Any]:
    """Model with a new adapter, objective and training data of a run."""
    if method in QUESTION_RUNS:
        return question_parts(method, count=count * 2 // 3)
    (case,) = [case for case in CASES if case.method == method]
    dataset = images().select(range(count))
    if augmented:
        dataset.transform = TrainTransform(clip_processor())
    return get_peft_model(base_model(), case.config()), case.objective(class_prompts(), **settings), dataset


def question_parts(method: str, *, count: int) -> tuple[Any, Any, Any]:
    """A multimodal model, and questions with answers of different length."""
    collator = QuestionCollator(llava_processor(), clip_processor=clip_processor(16))
    names = list(colour_names())
    rows = colour_rows(3)[:count]
    dataset = ImageQuestionDataset(rows, names, question=QUESTION, label_column="label", collator=collator)
    if method == "skip_tuning_answers":
        return get_peft_model(tiny_llava(), SkipTuningConfig(start_layer=1)), SkipTuningAnswerObjective(), dataset
    model = get_peft_model(tiny_llava(), TVPConfig.for_processor(clip_processor(), canvas_size=32, border=5))
    guide = ClipGuide(tiny_clip(seed=7), class_prompts(names), processor=clip_processor(16))
    return model, TVPObjective(None, fca_weight=0.05, tse_weight=0.1, tse_clip=guide), dataset


def train(
    folder: str | Path,
    method: str,
    *,
    resume: str | bool | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    settings: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    change: Callable[[Any, Any, Any], None] | None = None,
    **arguments: Any,
) -> VLMTrainer:
    """Train two epochs; the final tensors of each process go to `final-<rank>.safetensors`."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model, objective, dataset = parts(method, **(data or {}), **(settings or {}))
    own = {"num_train_epochs": 2, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    own |= {"save_total_limit": None, "logging_steps": 1, "seed": 3, "disable_tqdm": True, "use_cpu": True}
    args = VLMTrainingArguments(output_dir=str(folder), report_to="none", **(own | arguments))
    if change is not None:
        change(model, objective, dataset)
    trainer = VLMTrainer(model, args, train_dataset=dataset, callbacks=list(callbacks), objective=objective)
    trainer.train(resume_from_checkpoint=resume)
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, os.path.join(folder, f"final-{args.process_index}.safetensors"))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--method", required=True, choices=RUNS)
    options = parser.parse_args()
    train(options.folder, options.method)
