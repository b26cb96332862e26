"""CPU time and peak memory of a PromptKD step at real size: ViT-B/16 student, ViT-L/14 teacher, random weights.

    python benchmarks/promptkd.py            # a table
    python benchmarks/promptkd.py --json     # and one JSON object as the last line

Variants, each in a child process of its own, in turn over several rounds; ratios are taken within a round:

    official      our replica of the official loop: in every step the teacher encodes the images and all class prompts
                  at length 77, then the student runs forward and backward
    uncached      this package: class vectors once, the teacher's image features in every step
    cached        this package from the second epoch on: the teacher's features of the views are stored
    student_only  forward and backward of the student to a scalar: what no implementation can leave out

100 classes, batch 8, 224 px, float32, SGD with momentum, student prompts of depth 9. CPU seconds are user plus system
time of the process; memory is the peak above the loaded models. For 1,000 classes the speed-up is given by operation
count (multiplications of the matrix products, a backward pass through frozen weights as one forward pass).
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from measuring import TOKENS, measure, print_summary, process_mb, random_clip, random_prompts, summary, timed_steps

NUM_CLASSES, BATCH, DEPTH = 100, 8, 9
VARIANTS = ("official", "uncached", "cached", "student_only")


def child(variant: str, steps: int) -> dict[str, float]:
    """Run one variant and measure it."""
    from peft import get_peft_model

    from peft_vlm import PromptKDConfig
    from peft_vlm.experiments.report import PeakMemory

    torch.manual_seed(0)
    student = get_peft_model(random_clip(), PromptKDConfig(class_dim=768, vision_depth=DEPTH)).train()
    teacher = None if variant == "student_only" else random_clip(large=True).eval()
    optimizer = torch.optim.SGD(
        [p for p in student.parameters() if p.requires_grad], lr=0.005, momentum=0.9, weight_decay=5e-4
    )
    pixels = torch.randn(BATCH, 3, 224, 224)
    loss_of = {"official": official, "student_only": student_only}.get(variant, ours)(
        student, teacher, pixels, variant
    )

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    seconds = timed_steps(step, steps)
    return {"cpu_per_step": seconds, "peak_mb": peak.stop() or 0.0, "process_mb": process_mb()}


def official(student: Any, teacher: Any, pixels: torch.Tensor, variant: str) -> Callable[[], torch.Tensor]:
    """The official order of work, on Hugging Face's own forward passes."""
    from torch import nn

    ids = random_prompts(NUM_CLASSES, full_length=True).input_ids
    student.set_class_vectors([f"class {index}" for index in range(NUM_CLASSES)], torch.randn(NUM_CLASSES, 768))

    def loss() -> torch.Tensor:
        with torch.no_grad():
            text = nn.functional.normalize(teacher.get_text_features(input_ids=ids).pooler_output, dim=-1)
            image = nn.functional.normalize(teacher.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            target = teacher.logit_scale.exp() * image @ text.T
        base = student.get_base_model()
        image = nn.functional.normalize(base.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        logits = base.logit_scale.exp() * image @ text.T
        divergence = nn.functional.kl_div(
            logits.log_softmax(dim=-1), target.log_softmax(dim=-1), reduction="sum", log_target=True
        )
        return 1000.0 * divergence / logits.numel()

    return loss


def ours(student: Any, teacher: Any, pixels: torch.Tensor, variant: str) -> Callable[[], torch.Tensor]:
    """`PromptKDObjective`, with and without stored views."""
    from peft_vlm import PromptKDObjective
    from peft_vlm.data.dataset import ImageClassificationDataset

    class RandomPixels(ImageClassificationDataset):
        def __getitem__(self, index: int) -> Any:
            return {"pixel_values": pixels[index], "labels": -1, "index": index}

    prompts = random_prompts(NUM_CLASSES, full_length=False)
    dataset = RandomPixels([{"image": None}] * BATCH, prompts.class_names, label_column=None)
    objective = PromptKDObjective(prompts, teacher=teacher, teacher_cache="views" if variant == "cached" else "none")
    objective.prepare(student, dataset)
    objective.epoch_start(student, dataset, 0)
    batch: Any = {"pixel_values": pixels, "labels": torch.full((BATCH,), -1), "index": torch.arange(BATCH)}
    return lambda: objective(student, batch).loss


def student_only(student: Any, teacher: Any, pixels: torch.Tensor, variant: str) -> Callable[[], torch.Tensor]:
    """The student's forward pass to a scalar; the last layer computes the class token only."""
    from peft_vlm.models.towers import towers_of

    towers = towers_of(student)
    return lambda: towers.finish_image(towers.embed_image(pixels), 0).square().mean()


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Speed-ups and memory, within one round."""
    reference, uncached, cached, student = (results[variant] for variant in VARIANTS)
    return {
        "speedup_uncached": reference["cpu_per_step"] / uncached["cpu_per_step"],
        "speedup_cached": reference["cpu_per_step"] / cached["cpu_per_step"],
        "student_share": student["cpu_per_step"] / cached["cpu_per_step"],
        "memory_ratio_uncached": uncached["peak_mb"] / reference["peak_mb"],
        "memory_ratio_cached": cached["peak_mb"] / reference["peak_mb"],
    }


def by_count(num_classes: int) -> dict[str, float]:
    """Speed-ups by the multiplications of the matrix products.

    Args:
        num_classes: Number of classes.
    """

    def tower(tokens: int, width: int, layers: int) -> float:
        return layers * (12 * tokens * width**2 + 2 * tokens**2 * width)

    teacher_text = num_classes * tower(TOKENS, 768, 12)
    teacher_image, student = BATCH * tower(257, 1024, 24), BATCH * tower(201, 768, 12)
    whole = teacher_text + teacher_image + 2 * student
    return {"speedup_uncached": whole / (teacher_image + 2 * student), "speedup_cached": whole / (2 * student)}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the variants")
    parser.add_argument("--steps", type=int, default=1, help="measured steps per child process")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.steps)))
        return
    started = time.perf_counter()
    result = summary(measure(__file__, VARIANTS, rounds=args.rounds, options=["--steps", str(args.steps)]), ratios)
    result["by_count"] = {str(count): by_count(count) for count in (NUM_CLASSES, 1000)}
    print_summary(result, {"cpu_per_step": "CPU s/step", "peak_mb": "peak MB", "process_mb": "process MB"})
    for count, values in result["by_count"].items():
        numbers = ", ".join(f"{key} {value:.1f}" for key, value in values.items())
        print(f"by operation count, {count} classes: {numbers}")
    print(f"{args.rounds} rounds in {time.perf_counter() - started:.0f} s")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
