"""Speed and memory of a training step of every method at ViT-B/16 size (random weights), on a GPU or on the CPU.

    python benchmarks/gpu.py                                  # float32, bf16 and fp16 on the GPU; a table
    python benchmarks/gpu.py --suite short --output gpu.json  # compiled steps, `gpu` tests, two processes, too
    python benchmarks/gpu.py --device cpu --size small        # minutes on two cores, to see that it runs
    python benchmarks/gpu.py --compile                        # with the steps compiled, as `torch_compile=True` does

For each method and precision: images per second of a whole step (forward, backward,
SGD), peak memory above the loaded model, and the share of the matrix-product bound: operations of the step's matrix
products as torch counts them, over the step's time and the rate at which the device multiplies two matrices of
8192 rows and columns (1024 on the CPU) in that precision; on a GPU also in bf16. 100 classes, no stored features;
`full` is full fine-tuning.

The short suite ends within 8 minutes on one H100 and needs pytest and pytest-timeout beside the package. What fails or
finds no time is named in the JSON file under `not_run`.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from measuring import random_clip, random_prompts
from peft_vlm.data.dataset import ImageClassificationDataset

METHODS = (
    "full",
    *("coop", "atprompt", "kgcoop", "pre", "cocoop", "cpl", "bayesian", "promptsrc", "maple"),
    *("promptkd", "skip_tuning", "rpp", "tvp", "clip_lora"),
)
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_CLASSES = 100
LIMIT = 100
ROOT = Path(__file__).resolve().parent.parent


class RandomImages(ImageClassificationDataset):
    """Noise with labels, made once."""

    def __init__(self, count: int, size: int) -> None:
        rows = [{"image": None, "label": index % NUM_CLASSES} for index in range(count)]
        super().__init__(rows, [f"class {index}" for index in range(NUM_CLASSES)])
        self.pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "index": index}


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


class FullFineTuning:
    """Cross-entropy over class prompts with every parameter of the model trained, in transformers' own forward."""

    def __init__(self, prompts: Any) -> None:
        self.prompts = prompts

    def adapt_to(self, model: nn.Module, dataset: Any) -> None:
        """Nothing."""

    def prepare(self, model: nn.Module, dataset: Any) -> None:
        """Train everything."""
        model.requires_grad_(True)

    def epoch_start(self, model: nn.Module, dataset: Any, epoch: int) -> None:
        """Nothing."""

    def optimizer(self, model: nn.Module, *, learning_rate: float) -> None:
        """The ordinary one."""

    def __call__(self, model: Any, batch: dict[str, Any]) -> Any:
        """The loss."""
        from peft_vlm.objective import ObjectiveOutput

        ids = self.prompts.input_ids.to(batch["labels"].device)
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits_per_image
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        return ObjectiveOutput({"cross_entropy": loss}, logits, batch["labels"])


def build(method: str, clip: Any, teacher: Any, prompts: Any) -> tuple[nn.Module, Any]:
    """Adapter and objective of a method, with the settings of its paper where the size allows; no stored features."""
    from peft import get_peft_model

    from peft_vlm.registry import METHODS as METHODS_BY_NAME

    if method == "full":
        return clip, FullFineTuning(prompts)
    depth = min(9, clip.config.vision_config.num_hidden_layers)
    deep = {"text_depth": depth, "vision_depth": depth, "context_init": None}
    size = clip.config.vision_config.image_size
    pixel = {"canvas_size": size, "border": size // 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    lora = {"r": 2, "lora_alpha": 1, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    configs = {
        "coop": {"num_text_tokens": 4},
        "atprompt": {"num_text_tokens": 2, "attribute_ids": [[320], [321]]},
        "pre": {"num_text_tokens": 4, "network": "lstm"},
        "kgcoop": {"num_text_tokens": 4},
        "cocoop": {"num_text_tokens": 4, "context_init": None},
        "cpl": {"num_text_tokens": 4, "context_init": None},
        "bayesian": {"num_text_tokens": 4, "context_init": None, "num_samples": 4},
        "promptsrc": deep,
        "maple": {"depth": depth, "context_init": None},
        "promptkd": {"class_dim": teacher.config.projection_dim if teacher else 0, "vision_depth": depth},
        "skip_tuning": {"start_layer": depth * 2 // 3},
        "rpp": {"text_depth": 1, "vision_depth": depth - 1, "context_init": None},
        "tvp": pixel,
        "clip_lora": lora,
    }
    own = {
        "coop": {"image_cache": "none"},
        "atprompt": {"image_cache": "none"},
        "pre": {"image_cache": "none"},
        "kgcoop": {"image_cache": "none"},
        "cocoop": {"image_cache": "none"},
        "cpl": {"image_cache": "none"},
        "promptsrc": {"image_cache": "none"},
        "promptkd": {"teacher": teacher},
        "skip_tuning": {"image_cache": "none"},
        "rpp": {"soft_weight": 0.0, "num_sampled_classes": NUM_CLASSES},
        "tvp": {"tse_weight": 0.0},
    }
    record = METHODS_BY_NAME[method]
    assert record.objective is not None
    model = get_peft_model(clip, record.adapter_type.config(**configs[method]))
    return model, record.objective(prompts, **own.get(method, {}))


def child(cells: list[str], options: argparse.Namespace) -> None:
    """Measure cells such as `coop:bf16` or, with a compiled step, `coop:bf16:compiled`; print a line for each."""
    for cell in cells:
        method, precision, *compiled = cell.split(":")
        row = measured(method, precision, options, is_compiled=bool(compiled))
        print(json.dumps({"method": method, "precision": precision, "compiled": bool(compiled), **row}), flush=True)
        torch.compiler.reset()
        gc.collect()


def measured(method: str, precision: str, options: argparse.Namespace, *, is_compiled: bool) -> dict[str, Any]:
    """Memory of the first step, operations of the second, time of the others, which may be compiled."""
    from peft_vlm.experiments.report import PeakMemory
    from peft_vlm.training.module import TrainingModule

    device = torch.device(options.device)
    with device:  # random weights of 0.6 billion numbers take seconds on a CPU
        small = options.size == "small"
        clip = small_clip() if small else random_clip()
        teacher = (small_clip() if small else random_clip(large=True)).eval() if method == "promptkd" else None
    prompts = random_prompts(NUM_CLASSES, full_length=False)
    model, objective = build(method, clip, teacher, prompts)
    model.to(device).train()
    dataset = RandomImages(options.batch, clip.config.vision_config.image_size)
    batch = {
        key: value.to(device) for key, value in dataset.collate([dataset[i] for i in range(options.batch)]).items()
    }
    objective.adapt_to(model, dataset)
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
    plain, fast = partial(step, module), partial(step, torch.compile(module) if is_compiled else module)
    peak = PeakMemory(device)
    peak.start()
    plain()
    memory = peak.stop()
    with FlopCounterMode(display=False) as counter:
        plain()
    operations = counter.get_total_flops()
    for _ in range(2 if is_compiled else 0):  # shapes that change make it compile a second time
        fast()
    seconds = timed(fast, options.steps, device)
    rate = operations / seconds
    return {
        "images_per_second": options.batch / seconds,
        "peak_mb": memory,
        "teraflop_per_step": operations / 1e12,
        "share_of_bound": rate / matrix_rate(dtype, device),
        "share_of_bf16_bound": rate / matrix_rate(torch.bfloat16, device) if device.type == "cuda" else None,
    }


def train_step(module: Any, *, batch: dict[str, Any], optimizer: Any, autocast: Any, scaler: Any) -> None:
    """Forward, backward, update."""
    optimizer.zero_grad()
    with autocast:
        loss = module(**batch)["loss"]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


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
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, 10 if device.type == "cuda" else 3, device)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", choices=["short"], help="steps, compiled steps, `gpu` tests, two processes on a card"
    )
    parser.add_argument("--seconds", type=float, default=470, help="of a suite; what does not fit is left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["vit_b16", "small"], default="vit_b16")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), help="all that the device has")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile the step with torch.compile")
    parser.add_argument("--output", type=Path, help="JSON file, written after every method")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--child", nargs="+", metavar="CELL", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args()


class Session:
    """Results so far, in a JSON file that is whole after every step, and the time left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + (options.seconds if options.suite else 1e9)
        name = f"{platform.machine()} CPU"
        if options.device.startswith("cuda"):
            name = torch.cuda.get_device_name(options.device)
        self.facts: dict[str, Any] = {"device": name, "torch": torch.__version__, "size": options.size}
        self.facts |= {"batch": options.batch, "rows": [], "not_run": []}

    def save(self, **facts: Any) -> None:
        """Write the file."""
        self.facts |= facts
        if self.options.output:
            self.options.output.write_text(json.dumps(self.facts, indent=2) + "\n")

    def run(self, what: str, command: list[str], *, limit: float = 1e9) -> str:
        """Output of a command; what fails or finds no time is noted by name."""
        limit = min(limit, self.end - time.monotonic())
        if limit <= 0:
            self.facts["not_run"].append(f"{what}: no time left")
            return ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
        except subprocess.TimeoutExpired as error:
            self.facts["not_run"].append(f"{what}: stopped after {limit:.0f} seconds")
            return (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            self.facts["not_run"].append(f"{what}: exit status {done.returncode}, {' '.join(reason)}")
            print(done.stderr[-1500:], file=sys.stderr)
        return done.stdout

    def steps(self, cells: list[str]) -> None:
        """Measure cells in a process, and those after one that fails or hangs in another process."""
        options, left = self.options, list(cells)
        common = ["--device", options.device, "--size", options.size, "--batch", str(options.batch)]
        command = [sys.executable, str(Path(__file__).resolve()), *common, "--steps", str(options.steps), "--child"]
        while left:
            seconds = self.end - time.monotonic()
            if seconds <= 0:
                self.facts["not_run"] += [f"{cell}: no time left" for cell in left]
                return
            process = subprocess.Popen([*command, *left], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            while left and (line := self.line_of(process)):
                if line.startswith("{"):
                    self.add(json.loads(line))
                    left.pop(0)
            process.kill()
            process.wait()
            if left:
                self.facts["not_run"].append(f"{left.pop(0)}: it failed, or took more than {LIMIT} seconds")

    def line_of(self, process: Any) -> str:
        """Next line that a process prints; nothing when it ends or takes too long."""
        watch = threading.Timer(min(LIMIT, max(0.0, self.end - time.monotonic())), process.kill)
        watch.start()
        line = process.stdout.readline()
        watch.cancel()
        return line

    def add(self, row: dict[str, Any]) -> None:
        """Note and print a measured cell."""
        self.facts["rows"].append(row)
        memory = float("nan") if row["peak_mb"] is None else row["peak_mb"]
        cell = row["precision"] + (" compiled" if row["compiled"] else "")
        numbers = f"{row['images_per_second']:10.1f}{memory:10.0f}{row['share_of_bound']:10.1%}"
        print(f"{row['method']:12}{cell:>16}{numbers}", flush=True)
        self.save()

    def gpu_tests(self) -> None:
        """The tests that need a GPU."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/training"]
        output = self.run("gpu tests", command, limit=180).strip().splitlines()
        print("gpu tests:", output[-1] if output else "not run", flush=True)
        self.save(gpu_tests=output[-1] if output else None)

    def two_ranks(self) -> None:
        """Two processes on the card with gloo train what one process with twice the batch trains."""
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            own = [str(Path(__file__).resolve()), "--ranks"]
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            self.run("one process", [sys.executable, *own, f"{folder}/one"], limit=120)
            self.run("two processes", [*launch, "2", *own, f"{folder}/two"], limit=120)
            differences = {}
            for path in sorted(Path(folder, "one").glob("*/final-0.safetensors")):
                other = Path(folder, "two", path.parent.name, path.name)
                if not other.exists():  # noted under `not_run`
                    continue
                one, two = load_file(path), load_file(other)
                differences[path.parent.name] = max(float((one[key] - two[key]).abs().max()) for key in one)
        print("two processes on one card, largest difference of a trained tensor:", differences, flush=True)
        self.save(two_ranks_largest_difference=differences)


def train_ranks(folder: Path) -> None:
    """Train four methods on tiny models on the GPU, by one process or as one of two."""
    import os

    sys.path.insert(0, str(ROOT))
    from tests.short_run import train

    own: dict[str, Any] = {"save_strategy": "no", "use_cpu": False, "per_device_train_batch_size": 8}
    if "RANK" in os.environ:
        own |= {"ddp_backend": "gloo", "per_device_train_batch_size": 4}
        os.environ["LOCAL_RANK"] = "0"  # DDP takes the card of this number, which both share
    for method in ("coop", "promptsrc", "skip_tuning", "tvp"):
        train(folder / method, method, max_steps=6, **own)


def main() -> None:
    """Run every method in every precision and print a table."""
    options = parse_arguments()
    if options.child:
        child(options.child, options)
        return
    if options.ranks:
        train_ranks(options.ranks)
        return
    is_gpu = options.device.startswith("cuda")
    precisions = options.precisions or (list(PRECISIONS) if is_gpu else ["float32", "bf16"])
    session = Session(options)
    print(f"{session.facts['device']}, torch {torch.__version__}, size {options.size}, batch {options.batch}")
    print(f"{'method':12}{'precision':>16}{'images/s':>10}{'peak MB':>10}{'of bound':>10}")
    compiled = ":compiled" if options.compile else ""
    session.steps([f"{method}:{precision}{compiled}" for precision in precisions for method in options.methods])
    if options.suite:
        session.two_ranks()
        session.gpu_tests()
        session.steps([f"{method}:bf16:compiled" for method in options.methods])
    session.save()
    for line in session.facts["not_run"]:
        print("not run:", line)
    if options.json:
        print(json.dumps(session.facts))


if __name__ == "__main__":
    main()
