"""CPU time and peak memory of Skip Tuning against full fine-tuning at ViT-B/16 size (random weights).

    python benchmarks/skip_tuning.py            # a table
    python benchmarks/skip_tuning.py --json     # and one JSON object as the last line

Three variants, each in a child process of its own, in turn over several rounds; ratios are taken within a round:

    full_finetuning      all layers of both towers, text at length 77: what the official code compares with
    full_finetuning_cut  the same with text cut to its longest prompt
    skip_tuning          this package: start layer 6, cached lower layers, class skipping 0.5 / 50

100 classes, batch 4, 224 px, float32, SGD with momentum. CPU seconds are user plus system time of the process. Memory
is the peak above the loaded model (`memory_ratio`); the ratio of whole processes is printed too. Printed are medians
over the rounds and their range. An epoch is 16 shots x 100 classes = 400 steps; caching is measured on some images and
scaled by their number.
"""

import argparse
import json
import time
from typing import Any

import torch

from measuring import (
    cpu_seconds,
    measure,
    print_summary,
    process_mb,
    random_clip,
    random_prompts,
    summary,
    timed_steps,
)

SHOTS, NUM_CLASSES, BATCH = 16, 100, 4
VARIANTS = ("full_finetuning", "full_finetuning_cut", "skip_tuning")


def child(variant: str, steps: int, cached_images: int) -> dict[str, float]:
    """Run one variant and measure it."""
    from peft_vlm.experiments.report import PeakMemory

    model = random_clip()
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    run_step, caching = (skip_tuning if variant == "skip_tuning" else full_finetuning)(model, variant, cached_images)
    return {
        "cpu_per_step": timed_steps(run_step, steps),
        "cpu_caching_per_image": caching,
        "peak_mb": peak.stop() or 0.0,
        "process_mb": process_mb(),
    }


def full_finetuning(model: Any, variant: str, cached_images: int) -> tuple[Any, float]:
    """A step of full fine-tuning."""
    from peft_vlm.experiments.compare import FullFineTuningObjective

    objective = FullFineTuningObjective(random_prompts(NUM_CLASSES, full_length=variant == "full_finetuning"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4)
    pixels = torch.randn(BATCH, 3, 224, 224)

    def step() -> None:
        optimizer.zero_grad()
        objective(model, {"pixel_values": pixels, "labels": torch.zeros(BATCH, dtype=torch.long)}).loss.backward()
        optimizer.step()

    return step, 0.0


def skip_tuning(model: Any, variant: str, cached_images: int) -> tuple[Any, float]:
    """A step of Skip Tuning from the cache, and the CPU seconds of caching an image."""
    from peft import get_peft_model

    from peft_vlm import SkipTuningConfig, SkipTuningObjective
    from peft_vlm.data.dataset import ImageClassificationDataset

    class RandomPixels(ImageClassificationDataset):
        def __getitem__(self, index: int) -> Any:
            return {"pixel_values": torch.randn(3, 224, 224), "labels": self.labels[index], "index": index}

    rows = [{"image": None, "label": index // SHOTS % NUM_CLASSES} for index in range(cached_images)]
    prompts = random_prompts(NUM_CLASSES, full_length=False)
    dataset = RandomPixels(rows, prompts.class_names)
    peft_model = get_peft_model(model, SkipTuningConfig(start_layer=6))
    objective = SkipTuningObjective(prompts, image_cache="ram", cache_batch_size=16)
    optimizer = torch.optim.SGD(
        [p for p in peft_model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9, weight_decay=5e-4
    )
    objective.prepare(peft_model, dataset)
    before = cpu_seconds()
    objective.epoch_start(peft_model, dataset, 0)
    caching = (cpu_seconds() - before) / cached_images
    index = torch.arange(BATCH)

    def step() -> None:
        optimizer.zero_grad()
        objective(peft_model, {"index": index, "labels": torch.zeros(BATCH, dtype=torch.long)}).loss.backward()
        optimizer.step()

    return step, caching


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Skip Tuning to full fine-tuning, within one round."""
    full, cut, ours = (results[variant] for variant in VARIANTS)
    steps = SHOTS * NUM_CLASSES // BATCH
    epoch = steps * ours["cpu_per_step"] + SHOTS * NUM_CLASSES * ours["cpu_caching_per_image"]
    return {
        "cpu_ratio": ours["cpu_per_step"] / full["cpu_per_step"],
        "memory_ratio": ours["peak_mb"] / full["peak_mb"],
        "epoch_cpu_ratio": epoch / (steps * full["cpu_per_step"]),
        "process_memory_ratio": ours["process_mb"] / full["process_mb"],
        "cpu_ratio_to_cut_text": ours["cpu_per_step"] / cut["cpu_per_step"],
        "memory_ratio_to_cut_text": ours["peak_mb"] / cut["peak_mb"],
        "epoch_cpu_ratio_to_cut_text": epoch / (steps * cut["cpu_per_step"]),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the variants")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per child process")
    parser.add_argument("--cached-images", type=int, default=64, help="images cached in the measurement of caching")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.steps, args.cached_images)))
        return
    started = time.perf_counter()
    options = ["--steps", str(args.steps), "--cached-images", str(args.cached_images)]
    result = summary(measure(__file__, VARIANTS, rounds=args.rounds, options=options), ratios)
    print_summary(result, {"cpu_per_step": "CPU s/step", "peak_mb": "peak MB", "process_mb": "process MB"})
    print(f"{args.rounds} rounds in {time.perf_counter() - started:.0f} s")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
