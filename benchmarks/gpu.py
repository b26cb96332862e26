"""Speed and memory of a training step of every method at ViT-B/16 size (random weights), on a GPU or on the CPU.

    python benchmarks/gpu.py                                  # float32, bf16 and fp16 on the GPU; a table
    python benchmarks/gpu.py --device cpu --size small        # minutes on two cores, to see that it runs
    python benchmarks/gpu.py --output benchmarks/gpu.json     # and a JSON file with the device's name
    python benchmarks/gpu.py --compile                        # with the steps compiled, as `torch_compile=True` does

For each method and precision, in a process of its own: images per second of a whole step (forward, backward, SGD),
peak memory above the loaded model, and the share of the matrix-product bound: operations of the step's matrix
products as torch counts them, divided by the step's time and by the rate at which the device multiplies two 4096 x
4096 matrices (1024 on the CPU) in that precision. 100 classes.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from measuring import random_clip, random_prompts

METHODS = ("coop", "promptsrc", "promptkd", "skip_tuning", "rpp", "tvp")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 100


class RandomImages(torch.utils.data.Dataset):
    """Noise with labels, as a dataset of the trainer."""

    def __init__(self, count: int, size: int) -> None:
        self.class_names = tuple(f"class {index}" for index in range(NUM_CLASSES))
        self.labels = [index % NUM_CLASSES for index in range(count)]
        self.pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.transform, self.has_fixed_pixels = None, False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "index": index}

    def collate(self, items: Any) -> Any:
        """A batch."""
        from peft_vlm.data.dataset import collate

        return collate(items)

    def repeat_views(self, num_views: int | None) -> None:
        """Nothing is random."""


def small_clip() -> Any:
    """Two towers of 4 layers and width 128, 64 px: seconds on a CPU."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return CLIPModel(
        CLIPConfig(
            text_config=tower | text, vision_config=tower | {"image_size": 64, "patch_size": 16}, projection_dim=64
        )
    )


def build(method: str, clip: Any, teacher: Any, prompts: Any) -> tuple[nn.Module, Any]:
    """Adapter and objective of a method, with the settings of its paper where the size allows; no stored features."""
    from peft import get_peft_model

    import peft_vlm

    depth = min(9, clip.config.vision_config.num_hidden_layers)
    deep = {"text_depth": depth, "vision_depth": depth, "context_init": None}
    size = clip.config.vision_config.image_size
    pixel = {"canvas_size": size, "border": size // 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    configs = {
        "coop": lambda: peft_vlm.CoOpConfig(num_text_tokens=4),
        "promptsrc": lambda: peft_vlm.PromptSRCConfig(**deep),
        "promptkd": lambda: peft_vlm.PromptKDConfig(class_dim=teacher.config.projection_dim, vision_depth=depth),
        "skip_tuning": lambda: peft_vlm.SkipTuningConfig(start_layer=depth * 2 // 3),
        "rpp": lambda: peft_vlm.RPPConfig(text_depth=1, vision_depth=depth - 1, context_init=None),
        "tvp": lambda: peft_vlm.TVPConfig(**pixel),
    }
    objectives = {
        "coop": lambda: peft_vlm.CoOpObjective(prompts, image_cache="none"),
        "promptsrc": lambda: peft_vlm.PromptSRCObjective(prompts, image_cache="none"),
        "promptkd": lambda: peft_vlm.PromptKDObjective(prompts, teacher=teacher),
        "skip_tuning": lambda: peft_vlm.SkipTuningObjective(prompts, image_cache="none"),
        "rpp": lambda: peft_vlm.RPPObjective(prompts, soft_weight=0.0, num_sampled_classes=NUM_CLASSES),
        "tvp": lambda: peft_vlm.TVPObjective(prompts, tse_weight=0.0),
    }
    return get_peft_model(clip, configs[method]()), objectives[method]()


def child(method: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one method in one precision."""
    from peft_vlm.training.module import TrainingModule

    device = torch.device(options.device)
    small = options.size == "small"
    clip, teacher = (small_clip(), small_clip()) if small else (random_clip(), random_clip(large=method == "promptkd"))
    prompts = random_prompts(NUM_CLASSES, full_length=False)
    model, objective = build(method, clip.to(device), teacher.to(device).eval(), prompts)
    model.train()
    dataset = RandomImages(options.batch, clip.config.vision_config.image_size)
    batch = {
        key: value.to(device) for key, value in dataset.collate([dataset[i] for i in range(options.batch)]).items()
    }
    module = TrainingModule(model, objective)
    optimizer = objective.optimizer(model, learning_rate=1e-3) or torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9
    )
    dtype = PRECISIONS[precision]
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    with autocast:
        objective.prepare(model, dataset)
        objective.epoch_start(model, dataset, 0)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step = partial(train_step, batch=batch, optimizer=optimizer, autocast=autocast, scaler=scaler)
    fast = partial(step, torch.compile(module) if options.compile else module)
    return measured(partial(step, module), fast, options, dtype, device)


def train_step(module: Any, *, batch: dict[str, Any], optimizer: Any, autocast: Any, scaler: Any) -> None:
    """Forward, backward, update."""
    optimizer.zero_grad()
    with autocast:
        loss = module(**batch)["loss"]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def measured(
    step: Any, fast: Any, options: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Memory of the first step, operations of the second, time of the others, which are `fast`."""
    from peft_vlm.experiments.report import PeakMemory

    peak = PeakMemory(device)
    peak.start()
    step()
    memory = peak.stop()
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    for _ in range(2 if options.compile else 0):  # shapes that change make it compile a second time
        fast()
    seconds = timed(fast, options.steps, device)
    return {
        "images_per_second": options.batch / seconds,
        "peak_mb": memory,
        "teraflop_per_step": operations / 1e12,
        "share_of_bound": operations / seconds / matrix_rate(dtype, device),
    }


def timed(step: Any, steps: int, device: torch.device) -> float:
    """Seconds per step."""
    step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large matrix product."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, 20 if device.type == "cuda" else 3, device)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["vit_b16", "small"], default="vit_b16")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), help="all that the device has")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile the step with torch.compile")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "PRECISION"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(method: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own and print a line of the table."""
    common = ["--device", options.device, "--size", options.size, "--batch", str(options.batch)]
    common += ["--compile"] if options.compile else []
    command = [sys.executable, __file__, *common, "--steps", str(options.steps), "--child", method, precision]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = {"method": method, "precision": precision, **json.loads(output.splitlines()[-1])}
    memory = float("nan") if row["peak_mb"] is None else row["peak_mb"]
    print(
        f"{method:12}{precision:>10}{row['images_per_second']:10.1f}{memory:10.0f}{row['share_of_bound']:10.1%}",
        flush=True,
    )
    return row


def main() -> None:
    """Run every method in every precision and print a table."""
    options = parse_arguments()
    if options.child:
        print(json.dumps(child(*options.child, options)))
        return
    is_gpu = options.device.startswith("cuda")
    name = torch.cuda.get_device_name(options.device) if is_gpu else f"{platform.machine()} CPU"
    precisions = options.precisions or (list(PRECISIONS) if is_gpu else ["float32", "bf16"])
    print(f"{name}, torch {torch.__version__}, size {options.size}, batch {options.batch}")
    print(f"{'method':12}{'precision':>10}{'images/s':>10}{'peak MB':>10}{'of bound':>10}")
    rows = [run_child(method, precision, options) for method in options.methods for precision in precisions]
    facts = {"device": name, "torch": torch.__version__, "size": options.size, "batch": options.batch}
    facts |= {"compiled": options.compile, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(facts, indent=2) + "\n")
    if options.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
