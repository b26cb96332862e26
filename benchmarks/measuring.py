"""What the benchmarks share: models of real size with random weights, prompts, CPU time, and rounds of processes."""

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

Samples = dict[str, list[dict[str, float]]]
TOKENS = 77


def random_prompts(num_classes: int, *, full_length: bool) -> Any:
    """Prompts of 8 to 12 tokens, the lengths of 'a photo of a {}.' with names of one to five tokens."""
    from peft_vlm.text.prompts import ClassPrompts

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 13, (num_classes,), generator=generator)
    ids = torch.full((num_classes, TOKENS if full_length else int(lengths.max())), 49407)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[0] = 49406
        row[1 : length - 1] = torch.randint(300, 40000, (length - 2,), generator=generator)
    return ClassPrompts(tuple(f"class {index}" for index in range(num_classes)), ("{}",), ids)


def random_clip(*, large: bool = False, patch_size: int = 16) -> Any:
    """CLIP ViT-B with patches of a size, or ViT-L/14, with random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision["patch_size"], dim = patch_size, 512
    if large:
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision["patch_size"], dim = 14, 768
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))


def cpu_seconds() -> float:
    """User plus system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed_steps(step: Callable[[], Any], steps: int) -> float:
    """CPU seconds per step; a first step, which allocates gradients and momentum, does not count."""
    step()
    before = cpu_seconds()
    for _ in range(steps):
        step()
    return (cpu_seconds() - before) / steps


def process_mb() -> float:
    """Largest resident size of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(script: str, variants: Sequence[str], *, rounds: int, options: Sequence[str]) -> Samples:
    """Every variant in a child process of its own, in turn, over several rounds.

    Args:
        script: File that prints one JSON object as its last line when called with `--child VARIANT`.
        variants: Names of the variants.
        rounds: How often each runs.
        options: Further arguments of the script.
    """
    samples: Samples = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in variants:
            print(f"round {number + 1}/{rounds}: {variant} ...", file=sys.stderr, flush=True)
            command = [sys.executable, script, "--child", variant, *options]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            samples[variant].append(json.loads(output.splitlines()[-1]))
    return samples


def summary(samples: Samples, ratios: Callable[[dict[str, dict[str, float]]], dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and the smallest and largest round of each ratio.

    Args:
        samples: What `measure` gave.
        ratios: Ratios of one round, from its results by variant.
    """
    variants = list(samples)
    rounds = [ratios(dict(zip(variants, runs, strict=True))) for runs in zip(*samples.values(), strict=True)]
    columns = {key: [one[key] for one in rounds] for key in rounds[0]}
    return {key: statistics.median(values) for key, values in columns.items()} | {
        "ranges": {key: [min(values), max(values)] for key, values in columns.items()},
        "variants": {v: {k: statistics.median(s[k] for s in runs) for k in runs[0]} for v, runs in samples.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def print_summary(result: dict[str, Any], columns: dict[str, str]) -> None:
    """Two tables: variants, and ratios with their range.

    Args:
        result: What `summary` gave.
        columns: Titles of the measured columns.
    """
    print(f"{'variant':22}" + "".join(f"{title:>14}" for title in columns.values()))
    for variant, values in result["variants"].items():
        print(f"{variant:22}" + "".join(f"{values[key]:14.2f}" for key in columns))
    for key, (low, high) in result["ranges"].items():
        print(f"{key:30}{result[key]:.3f}  (rounds: {low:.3f} to {high:.3f})")
