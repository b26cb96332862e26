"""Which projector settings of PromptKD are robust: the spread over seeds on the bundled student, teacher and icons.

    python benchmarks/promptkd_stability.py            # a table
    python benchmarks/promptkd_stability.py --json     # and one JSON object as the last line

Projector-only distillation from the bundled zero-shot teacher on the unlabelled training images of all classes (one
view, stored features of both models), the official rate, schedule and weight unless the row says otherwise. A seed
changes the projector's start and the order of the images. H is the harmonic mean of the accuracies on base and new
classes of the test split, in percent.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PrinterCallback, set_seed

from peft_vlm import PromptKDConfig, PromptKDObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.splits import base_and_new_classes
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.methods.promptkd.objective import projector_of
from peft_vlm.text import tokenize_classes

ASSETS = Path(__file__).parents[1] / "examples" / "assets"

#: Name -> (adapter, objective, batch size, learning rate, half-precision projector).
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int, float, bool]] = {
    "official: batchnorm, batch 8": ({}, {}, 8, 0.005, False),
    "fp16 projector, no loss scaling": ({}, {}, 8, 0.005, True),
    "weight 10 x official": ({}, {"weight": 10_000.0}, 8, 0.005, False),
    "batch 32, rate 0.02": ({}, {}, 32, 0.02, False),
    "layernorm": ({"projector_norm": "layernorm"}, {}, 8, 0.005, False),
    "no norm": ({"projector_norm": "none"}, {}, 8, 0.005, False),
    "one linear layer": ({"projector_depth": 1}, {}, 8, 0.005, False),
    "default: batchmean, weight 10": ({}, {"reduction": "batchmean", "weight": 10.0}, 8, 0.005, False),
}


class Bench:
    """Models, data and stored features that every run shares."""

    def __init__(self) -> None:
        transform = EvalTransform(AutoImageProcessor.from_pretrained(ASSETS / "clip_student"))
        self.train = load_image_dataset(str(ASSETS / "icons"), split="train").with_transform(transform)
        test = load_image_dataset(str(ASSETS / "icons"), split="test").with_transform(transform)
        self.student = CLIPModel.from_pretrained(ASSETS / "clip_student").eval()
        self.teacher = CLIPModel.from_pretrained(ASSETS / "clip_teacher").eval()
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "clip_teacher")
        self.prompts = tokenize_classes(tokenizer, self.train.class_names, template="a {} icon", max_length=32)
        self.test_features, self.test_labels = (
            all_image_features(self.student, test).clone(),
            torch.tensor(test.labels),
        )
        self.cache: Any = None

    def run(self, name: str, seed: int, epochs: int, folder: Path) -> float:
        """H of one run."""
        adapter, objective, batch, rate, half = SETTINGS[name]
        set_seed(seed)
        model = get_peft_model(self.student, PromptKDConfig(class_dim=160, vision_depth=0, **adapter))
        if half:
            for module in projector_of(model).modules():
                if isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters()):
                    module.half()
        options = {"reduction": "official", "weight": 1000.0} | objective
        target = PromptKDObjective(
            self.prompts, teacher=self.teacher, teacher_cache="views", student_cache="views", **options
        )
        if self.cache is not None:
            target.cache = self.cache  # the same features in every run
        arguments = VLMTrainingArguments(
            output_dir=str(folder),
            seed=seed,
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=batch,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = VLMTrainer(model, arguments, train_dataset=self.train, objective=target)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
            score = self.score(model.eval())
        except FloatingPointError:
            score = float("nan")
        self.cache = target.cache
        self.student = model.unload()
        return score

    @torch.no_grad()
    def score(self, model: Any) -> float:
        """H on the stored test features."""
        vectors = model.get_base_model().text_projection.active_vectors.float()
        image = nn.functional.normalize(projector_of(model).project(self.test_features).float(), dim=-1)
        accuracies = []
        for half in base_and_new_classes(len(vectors)):
            ids = torch.tensor(half)
            rows = torch.isin(self.test_labels, ids)
            predicted = ids[(image[rows] @ vectors[ids].T).argmax(dim=-1)]
            accuracies.append(100 * (predicted == self.test_labels[rows]).float().mean().item())
        return harmonic_mean(*accuracies)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    started, bench = time.perf_counter(), Bench()
    results: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name, scores in results.items():
                scores.append(bench.run(name, seed, args.epochs, Path(folder)))
    print(f"{'setting':34}{'H, mean':>10}{'sd':>8}{'worst':>8}")
    for name, scores in results.items():
        mean, sd = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{name:34}{mean:10.1f}{sd:8.1f}{min(scores):8.1f}")
    print(f"{len(args.seeds)} seeds, {args.epochs} epochs, {time.perf_counter() - started:.0f} s")
    if args.json:
        print(json.dumps({"h": results, "seeds": args.seeds, "epochs": args.epochs, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
