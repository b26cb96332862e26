"""A short training as its own process (`python -m tests.short_run`), for tests that interrupt it or start several."""

import argparse
import os
import time

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import TrainerCallback

from peft_vlm import VLMTrainer, VLMTrainingArguments
from tests.cases import CASES, base_model, class_prompts, images


class Pause(TrainerCallback):
    """Sleeps after each step, so that there is time to interrupt the run."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Sleep."""
        time.sleep(self.seconds)


def main() -> None:
    """Train two epochs on 24 colour images; each process writes its final tensors to `final-<rank>.safetensors`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--method", required=True, choices=[case.method for case in CASES])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(3)
    (case,) = [case for case in CASES if case.method == options.method]
    model = get_peft_model(base_model(), case.config())
    args = VLMTrainingArguments(
        output_dir=options.folder,
        num_train_epochs=2,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        seed=3,
    )
    objective = case.objective(class_prompts())
    trainer = VLMTrainer(model, objective, args, train_dataset=images(), callbacks=[Pause(options.pause)])
    trainer.train(resume_from_checkpoint=options.resume)
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, os.path.join(options.folder, f"final-{args.process_index}.safetensors"))


if __name__ == "__main__":
    main()
