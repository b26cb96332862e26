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
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

SHOTS, NUM_CLASSES, BATCH, TOKENS = 16, 100, 4, 77
Samples = dict[str, list[dict[str, float]]]
VARIANTS = ("full_finetuning", "full_finetuning_cut", "skip_tuning")


def random_prompts(*, full_length: bool) -> Any:
    """Prompts of 8 to 12 tokens, the lengths of 'a photo of a {}.' with names of one to five tokens."""
    from peft_vlm.text.prompts import ClassPrompts

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 13, (NUM_CLASSES,), generator=generator)
    ids = torch.full((NUM_CLASSES, TOKENS if full_length else int(lengths.max())), 49407)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[0] = 49406
        row[1 : length - 1] = torch.randint(300, 40000, (length - 2,), generator=generator)
    return ClassPrompts(tuple(f"class {index}" for index in range(NUM_CLASSES)), ("{}",), ids)


def vit_b16() -> Any:
    """CLIP ViT-B/16 with random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPModel(CLIPConfig(text_config=ids, vision_config={**vision, "patch_size": 16}, projection_dim=512))


def cpu_seconds() -> float:
    """User plus system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def child(variant: str, steps: int, cached_images: int) -> dict[str, float]:
    """Run one variant and measure it."""
    from peft_vlm.training.memory import PeakMemory

    model = vit_b16()
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    run_step, caching = (skip_tuning if variant == "skip_tuning" else full_finetuning)(model, variant, cached_images)
    run_step()  # allocates momentum and gradients; not counted
    before = cpu_seconds()
    for _ in range(steps):
        run_step()
    return {
        "cpu_per_step": (cpu_seconds() - before) / steps,
        "cpu_caching_per_image": caching,
        "peak_mb": peak.stop() or 0.0,
        "process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def full_finetuning(model: Any, variant: str, cached_images: int) -> tuple[Any, float]:
    """A step of full fine-tuning."""
    from peft_vlm.baselines import FullFineTuningObjective

    objective = FullFineTuningObjective(random_prompts(full_length=variant == "full_finetuning"))
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
    prompts = random_prompts(full_length=False)
    dataset = RandomPixels(rows, prompts.class_names)
    peft_model = get_peft_model(model, SkipTuningConfig(start_layer=6))
    objective = SkipTuningObjective(prompts, cache_batch_size=16)
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


def measure(rounds: int, steps: int, cached_images: int) -> Samples:
    """All variants in turn."""
    samples: Samples = {variant: [] for variant in VARIANTS}
    for number in range(rounds):
        for variant in VARIANTS:
            print(f"round {number + 1}/{rounds}: {variant} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--child", variant, "--steps", str(steps)]
            command += ["--cached-images", str(cached_images)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            samples[variant].append(json.loads(output.splitlines()[-1]))
    return samples


def ratios(full: dict[str, float], cut: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """Skip Tuning to full fine-tuning, within one round."""
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


def summary(samples: Samples) -> dict[str, Any]:
    """Medians over the rounds, and the smallest and largest round of each ratio."""
    rounds = [ratios(*runs) for runs in zip(*(samples[variant] for variant in VARIANTS), strict=True)]
    columns = {key: [round[key] for round in rounds] for key in rounds[0]}
    medians = {v: {k: statistics.median(s[k] for s in runs) for k in runs[0]} for v, runs in samples.items()}
    return {key: statistics.median(values) for key, values in columns.items()} | {
        "ranges": {key: [min(values), max(values)] for key, values in columns.items()},
        "variants": medians,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
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
    result = summary(measure(args.rounds, args.steps, args.cached_images))
    print(f"{'variant':22}{'CPU s/step':>12}{'peak MB':>10}{'process MB':>12}")
    for variant, values in result["variants"].items():
        print(f"{variant:22}{values['cpu_per_step']:12.2f}{values['peak_mb']:10.0f}{values['process_mb']:12.0f}")
    for key, (low, high) in result["ranges"].items():
        print(f"{key:28}{result[key]:.3f}  (rounds: {low:.3f} to {high:.3f})")
    print(f"{args.rounds} rounds in {time.perf_counter() - started:.0f} s")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
