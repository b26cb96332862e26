"""Class prompts in one packed row against whole, padded prompts: time, memory, and how far the gradients differ.

    OMP_NUM_THREADS=1 python benchmarks/text_prefix.py [--json] [--rounds 3] [--steps 3]

CLIP ViT-B/16 with random weights. `coop`: 100 classes, 16 context vectors, stored image features. `pomp` and `rpp`:
256 sampled of 1,000 classes with 16 context vectors, or 4 vectors in 9 layers for queries, keys and values; hard
labels, batches of 8, images by a tower of one layer, so that the text counts. `encode`: features of 2,000 classes
whose prompts have 4 to 25 tokens, 10.3 in the mean: most names are short. Padded prompts run as before there was a
packed row: all tokens of all prompts in every layer but the last, which computes the pooled tokens alone. Each figure
comes from a process of its own.
"""

import argparse
import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from measuring import cpu_seconds, measure, print_summary, process_mb, random_clip, summary, timed_steps

TASKS = ("coop", "pomp", "rpp", "encode")
PATHS = ("packed", "padded")
BATCH = 8
#: Stands for training images whose features are stored.
IMAGES: Any = SimpleNamespace(has_fixed_pixels=True, repeat_views=lambda num_views: None)


def padded_finish_text(self: Any, hidden: Any, input_ids: Any, start: int) -> Any:
    """`Towers.finish_text` on whole prompts."""
    hidden = self.run_text(hidden, start, len(self.text_layers) - 1)
    layer, attention = self.text_layers[-1], self.text_layers[-1].self_attn
    positions = self.pooled_positions(input_ids)
    query = hidden[torch.arange(len(hidden)), positions][:, None]
    visible = torch.arange(hidden.shape[1]) <= positions[:, None]
    normed, shape = layer.layer_norm1(hidden), (len(hidden), -1, attention.num_heads, attention.head_dim)
    queries, keys, values = (
        projection(tokens).view(shape).transpose(1, 2)
        for projection, tokens in (
            (attention.q_proj, layer.layer_norm1(query)),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    attended = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None, None])
    query = query + attention.out_proj(attended.transpose(1, 2).flatten(2))
    query = query + layer.mlp(layer.layer_norm2(query))
    return self.model.text_projection(self.model.text_model.final_layer_norm(query[:, 0]))


def class_prompts(count: int, longest: int, *, mean: float | None = None) -> Any:
    """`{}.` with names of 1 to `longest` random tokens: equally often, or most of them short, around a mean."""
    from peft_vlm.text import ClassPrompts

    generator = torch.Generator().manual_seed(0)
    if mean is None:
        lengths = torch.randint(1, longest + 1, (count,), generator=generator) + 3
    else:
        lengths = (mean * torch.empty(count).exponential_(generator=generator)).ceil().long().clamp(1, longest) + 3
    ids = torch.full((count, int(lengths.max())), 49407)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[0], row[length - 2] = 49406, 269
        row[1 : length - 2] = torch.randint(300, 40000, (length - 3,), generator=generator)
    return ClassPrompts(tuple(f"class {index}" for index in range(count)), ("{}.",), ids)


def training(task: str) -> tuple[nn.Module, Any]:
    """Model with adapter and its objective, ready for the first batch."""
    from peft import get_peft_model

    from peft_vlm import CoOpConfig, CoOpObjective, RPPConfig, RPPObjective

    base = random_clip()
    if task == "coop":
        model = get_peft_model(base, CoOpConfig(num_text_tokens=16, context_init=None))
        objective: Any = CoOpObjective(class_prompts(100, 5))
        objective.prepare(model, IMAGES)
        objective._views.store.rows = torch.randn(1000, 512, generator=torch.Generator().manual_seed(2))
        return model.train(), objective
    base.vision_model.encoder.layers = base.vision_model.encoder.layers[:1]
    own: dict[str, Any] = {"context_init": None, "num_vision_tokens": 0}
    config = CoOpConfig(num_text_tokens=16, context_init=None)
    if task == "rpp":
        config = RPPConfig(num_text_tokens=4, text_depth=9, **own)
    model = get_peft_model(base, config).train()
    objective = RPPObjective(class_prompts(1000, 5), soft_weight=0.0, num_sampled_classes=256)
    objective.prepare(model, IMAGES)
    return model, objective


def child(task: str, path: str, steps: int) -> dict[str, float]:
    """One measurement."""
    from peft_vlm.models import packed_texts, towers
    from peft_vlm.text import encode_classes

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if path == "padded":
        towers.Towers.finish_text = padded_finish_text
    if task == "encode":
        model, prompts = random_clip(), class_prompts(2000, 22, mean=7.3)
        held, before = process_mb(), cpu_seconds()
        encode_classes(model, prompts)
        result = {"cpu_seconds": cpu_seconds() - before, "peak_mb": process_mb() - held}
    else:
        model, objective = training(task)
        parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(3)
        pixels = torch.randn(BATCH, 3, 224, 224, generator=generator)

        def step() -> None:
            labels = torch.randint(100, (BATCH,), generator=generator)
            for parameter in parameters:
                parameter.grad = None
            objective(model, {"pixel_values": pixels, "labels": labels, "index": labels}).loss.backward()

        held = process_mb()
        result = {"cpu_seconds": timed_steps(step, steps), "peak_mb": process_mb() - held}
    assert bool(packed_texts.passes["packed"]) == (path == "packed"), packed_texts.passes
    return result


def gradient_errors() -> dict[str, float]:
    """Largest difference between the gradients of the two paths, absolute and relative to the largest gradient."""
    from peft_vlm.models.towers import Towers

    packed, errors = Towers.finish_text, {"max_gradient_error": 0.0, "max_relative_gradient_error": 0.0}
    for task in ("coop", "pomp", "rpp"):
        torch.manual_seed(0)
        model, objective = training(task)
        labels = torch.arange(BATCH)
        batch = {"pixel_values": torch.randn(BATCH, 3, 224, 224), "labels": labels, "index": labels}
        found = []
        for Towers.finish_text in (padded_finish_text, packed):
            model.zero_grad()
            objective(model, batch).loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for expected, gradient in zip(*found, strict=True):
            error = float((gradient - expected).abs().max())
            errors["max_gradient_error"] = max(errors["max_gradient_error"], error)
            relative = error / float(expected.abs().max())
            errors["max_relative_gradient_error"] = max(errors["max_relative_gradient_error"], relative)
    return errors


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Speed-ups of one round, and the memory of CoOp's packed step over the padded one."""
    found = {
        f"{t}_speedup": results[f"{t}:padded"]["cpu_seconds"] / results[f"{t}:packed"]["cpu_seconds"] for t in TASKS
    }
    for task in ("coop", "pomp"):
        found[f"{task}_memory_ratio"] = results[f"{task}:packed"]["peak_mb"] / results[f"{task}:padded"]["peak_mb"]
    return found | {"memory_ratio": found["coop_memory_ratio"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child.split(":"), args.steps)))
        return
    variants = [f"{task}:{path}" for task in TASKS for path in PATHS]
    samples = measure(__file__, variants, rounds=args.rounds, options=["--steps", str(args.steps)])
    result = summary(samples, ratios) | gradient_errors()
    if args.json:
        print(json.dumps(result))
        return
    print_summary(result, {"cpu_seconds": "CPU s", "peak_mb": "peak MB"})
    for key in ("max_gradient_error", "max_relative_gradient_error"):
        print(f"{key:30}{result[key]:.1e}")


if __name__ == "__main__":
    main()
