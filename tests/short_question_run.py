"""A short training of a multimodal model as its own process (`python -m tests.short_question_run`)."""

import argparse
import os

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from peft_vlm import TVPConfig, TVPObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data import ImageQuestionDataset, QuestionCollator
from peft_vlm.methods.tvp import ClipGuide, prompt_of
from tests.cases import class_prompts
from tests.tiny import clip_processor, colour_rows, tiny_clip
from tests.tiny_questions import QUESTION, llava_processor, tiny_llava


def main() -> None:
    """Train two epochs on 12 questions; each process writes its final prompt to `final-<rank>.safetensors`.

    The answers have one length, so that the mean over the tokens of two batches is that over their union.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--accumulation", type=int, default=1, help="batches per optimizer step")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(3)
    rows = colour_rows(2)
    collator = QuestionCollator(llava_processor(), clip_processor=clip_processor(16))
    names = [f"colour {number}" for number in range(6)]
    dataset = ImageQuestionDataset(rows, names, question=QUESTION, label_column="label", collator=collator)
    model = get_peft_model(tiny_llava(), TVPConfig.for_processor(clip_processor(), canvas_size=32, border=5))
    prompts = class_prompts(names)
    guide = ClipGuide(tiny_clip(seed=7), prompts, processor=clip_processor(16))
    objective = TVPObjective(None, fca_weight=0.05, tse_weight=0.1, tse_clip=guide)
    args = VLMTrainingArguments(
        output_dir=options.folder,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=1.0,
        warmup_epochs=0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        seed=3,
    )
    VLMTrainer(model, objective, args, train_dataset=dataset).train()
    path = os.path.join(options.folder, f"final-{args.process_index}.safetensors")
    save_file({"prompt": prompt_of(model).contiguous()}, path)


if __name__ == "__main__":
    main()
