"""File sizes and CPU latency of an exported classifier against the CLIP that it comes from.

    python benchmarks/serving.py            # a table
    python benchmarks/serving.py --json     # and one JSON object as the last line

Two models, each with a PromptSRC adapter: the bundled student CLIP (48 px) with the 118 icon classes, and a ViT-B/32
with random weights (224 px) with 100 classes. Ways to classify a batch:

    clip_with_text   the adapted CLIP as transformers calls it: images and all class prompts in every request
    clip_cached      the adapted CLIP with class features computed once, as `PromptedClassifier` does
    torch            the exported classifier, plain torch
    onnx             the exported classifier, onnxruntime

One thread. Latency is CPU time (user plus system) per call, median over the calls, so that other processes on the
machine do not count. Sizes are those of the float32 files: CLIP and adapter, or the exported classifier.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from measuring import cpu_seconds, random_clip, random_prompts

ASSETS = Path(__file__).parent.parent / "examples" / "assets"
BATCHES = (1, 32)


def student() -> tuple[Any, Any, Any]:
    """The bundled student with an adapter, prompts of the icon classes, its image processor."""
    from peft import get_peft_model
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    from peft_vlm import PromptSRCConfig
    from peft_vlm.data import load_image_dataset
    from peft_vlm.text import tokenize_for_model

    folder = ASSETS / "clip_student"
    config = PromptSRCConfig(context_init=None, text_depth=3, vision_depth=4)
    model = get_peft_model(CLIPModel.from_pretrained(folder), config).eval()
    names = load_image_dataset(str(ASSETS / "icons"), split="test").class_names
    prompts = tokenize_for_model(model, AutoTokenizer.from_pretrained(folder), names, template="a {} icon")
    return model, prompts, AutoImageProcessor.from_pretrained(folder)


def vit_b32() -> tuple[Any, Any, Any]:
    """A ViT-B/32 with random weights and an adapter, 100 prompts of 8 to 12 tokens, CLIP's image processor."""
    from peft import get_peft_model
    from transformers import CLIPImageProcessorPil

    from peft_vlm import PromptSRCConfig

    model = get_peft_model(random_clip(patch_size=32), PromptSRCConfig(context_init=None)).eval()
    return model, random_prompts(100, full_length=False), CLIPImageProcessorPil()


MODELS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {"student": student, "vit_b32": vit_b32}


def latency(run: Callable[[], Any], calls: int) -> float:
    """Median CPU milliseconds of a call, after one that does not count."""
    run()
    samples = []
    for _ in range(calls):
        before = cpu_seconds()
        run()
        samples.append(1000 * (cpu_seconds() - before))
    return statistics.median(samples)


def file_sizes(model: Any, folder: Path) -> dict[str, float]:
    """Megabytes of the files that each way to classify needs."""
    base = model.get_base_model()
    adapter = {id(p) for n, p in base.named_parameters() if "promptsrc" in n}
    clip = sum(p.numel() * p.element_size() for p in base.parameters() if id(p) not in adapter)
    own = sum(p.numel() * p.element_size() for p in base.parameters() if id(p) in adapter)
    sizes = {"clip": clip, "adapter": own}
    sizes |= {path.suffix[1:]: path.stat().st_size for path in sorted(folder.glob("classifier.*"))}
    return {name: size / 1e6 for name, size in sizes.items()}


def measure_model(name: str, calls: int) -> dict[str, Any]:
    """Sizes, latencies and the largest difference of a logit."""
    from peft_vlm.evaluation.classify import cosine_logits
    from peft_vlm.export import plain_classifier, write_export
    from peft_vlm.serving.onnx import OnnxClassifier
    from peft_vlm.text import encode_classes, reserve_slots

    torch.manual_seed(0)
    model, prompts, processor = MODELS[name]()
    features = encode_classes(model, prompts)
    exported = plain_classifier(model, features, prompts.class_names, image_processor=processor)
    ids = reserve_slots(model, prompts).input_ids
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        write_export(exported, temporary, ["safetensors", "onnx"])
        onnx = OnnxClassifier(Path(temporary) / "classifier.onnx", threads=1)
        ways: dict[str, Callable[[Any], Any]] = {
            "clip_with_text": lambda x: model(pixel_values=x, input_ids=ids).logits_per_image,
            "clip_cached": cosine_logits(model, features),
            "torch": exported,
            "onnx": lambda x: torch.from_numpy(onnx(x.numpy())),
        }
        size = exported.card.architecture["image_size"]
        report: dict[str, Any] = {
            "classes": len(prompts.class_names),
            "mb": file_sizes(model, Path(temporary)),
            "ms": {},
        }
        for batch in BATCHES:
            pixels = torch.randn(batch, 3, *size)
            expected = ways["clip_with_text"](pixels)
            report["difference"] = max(float((run(pixels) - expected).abs().max()) for run in ways.values())
            repeats = calls if batch == 1 else max(3, calls // 4)
            report["ms"][str(batch)] = {way: latency(partial(run, pixels), repeats) for way, run in ways.items()}
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--calls", type=int, default=12, help="timed calls of one image; a quarter of them for 32")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reports = {name: measure_model(name, args.calls) for name in args.models}
    for name, report in reports.items():
        sizes = ", ".join(f"{part} {size:.1f}" for part, size in report["mb"].items())
        print(f"\n{name}, {report['classes']} classes; MB: {sizes}; largest difference {report['difference']:.1e}\n")
        print("| CPU ms per call | " + " | ".join(report["ms"]["1"]) + " |")
        print("|---" * (1 + len(report["ms"]["1"])) + "|")
        for batch, row in report["ms"].items():
            print(f"| batch {batch} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    if args.json:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
