"""What stands around the tensor work: the trainer, the checks of a prediction, and the import.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--json] [--rounds 5] [--epochs 15]

The bundled student, Skip Tuning on 256 emoji in batches of 32, with random crops. `trainer_over_loop`: CPU time of
`VLMTrainer.train()` up to the end of the last epoch, without checkpoints, logs and the closing reports, over that of a
plain loop (prepare, DataLoader, loss, backward, step) on the same images. `predict_checksum_share`: share of
`PromptedClassifier.predict` of one image spent on finding out whether the stored class features still hold.
`import_cpu_s_beyond_peft`: CPU seconds of `import peft_vlm` after `import peft`. Each figure comes from a process of
its own, one thread.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from measuring import cpu_seconds, measure, print_summary, summary, timed_steps

ASSETS = Path(__file__).parent.parent / "examples" / "assets"
VARIANTS = ("loop", "trainer", "predict", "import")
BATCH = 32


def parts() -> tuple[Any, Any, Any]:
    """Model with adapter, objective, and 256 training images in memory."""
    from peft import get_peft_model
    from transformers import AutoProcessor, CLIPModel

    from peft_vlm import SkipTuningConfig, SkipTuningObjective
    from peft_vlm.data import TrainTransform, load_image_dataset
    from peft_vlm.text import tokenize_for_model

    torch.manual_seed(0)
    folder = ASSETS / "clip_student"
    base, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    images = load_image_dataset(str(ASSETS / "emoji"), transform=TrainTransform(processor.image_processor))
    images = images.select(range(256))
    prompts = tokenize_for_model(base, processor.tokenizer, images.class_names, template="{} emoji")
    model = get_peft_model(base, SkipTuningConfig(start_layer=3, text_start_layer=2))
    return model, SkipTuningObjective(prompts, batch_composition="random"), images


def run_loop(epochs: int) -> float:
    """CPU seconds of a plain PyTorch loop."""
    model, objective, images = parts()
    before = cpu_seconds()
    objective.prepare(model.train(), images)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=2e-3, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH, shuffle=True, collate_fn=images.collate)
    for epoch in range(epochs):
        images.set_epoch(epoch)
        objective.epoch_start(model, images, epoch)
        for batch in loader:
            objective(model, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return cpu_seconds() - before


def run_trainer(epochs: int) -> float:
    """CPU seconds of `VLMTrainer.train()`."""
    from transformers import TrainerCallback

    from peft_vlm import VLMTrainer, VLMTrainingArguments

    class Clock(TrainerCallback):
        """CPU time at the end of the last epoch."""

        last_epoch = 0.0

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Read the clock."""
            self.last_epoch = cpu_seconds()

    model, objective, images = parts()
    with tempfile.TemporaryDirectory() as folder:
        args = VLMTrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        clock = Clock()
        trainer = VLMTrainer(model, args, train_dataset=images, objective=objective, callbacks=[clock])
        before = cpu_seconds()
        trainer.train()
        return clock.last_epoch - before


def run_predict() -> float:
    """Share of the CPU time of a prediction that finds out whether the stored class features still hold."""
    from transformers import AutoProcessor

    from peft_vlm import PromptedClassifier
    from peft_vlm.text.class_features import TextTensors

    model, _, images = parts()
    processor = AutoProcessor.from_pretrained(ASSETS / "clip_student")
    classifier = PromptedClassifier(
        model.eval(),
        processor.tokenizer,
        processor.image_processor,
        class_names=list(images.class_names),
        template="{} emoji",
    )
    image, state = images.image(0), TextTensors(model)
    whole = timed_steps(lambda: classifier.predict(image), 100)
    return timed_steps(lambda: state.is_same(TextTensors(model)), 100) / whole


def run_import() -> float:
    """CPU seconds of the import, beyond PEFT's own."""
    import peft  # noqa: F401

    before = cpu_seconds()
    import peft_vlm  # noqa: F401

    return cpu_seconds() - before


def child(variant: str, epochs: int) -> dict[str, float]:
    """One measurement: CPU seconds, or a share."""
    torch.set_num_threads(1)
    runs = {"loop": lambda: run_loop(epochs), "trainer": lambda: run_trainer(epochs)}
    return {"value": (runs | {"predict": run_predict, "import": run_import})[variant]()}


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Keys of one round."""
    values = {variant: result["value"] for variant, result in results.items()}
    return {
        "trainer_over_loop": values["trainer"] / values["loop"],
        "predict_checksum_share": values["predict"],
        "import_cpu_s_beyond_peft": values["import"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.epochs)))
        return
    samples = measure(__file__, VARIANTS, rounds=args.rounds, options=["--epochs", str(args.epochs)])
    result = summary(samples, ratios)
    if args.json:
        print(json.dumps(result))
    else:
        print_summary(result, {"value": "CPU s / share"})


if __name__ == "__main__":
    main()
