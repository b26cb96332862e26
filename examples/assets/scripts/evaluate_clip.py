"""Zero-shot accuracy of a bundled CLIP on the three evaluation sets, with controls.

    python evaluate_clip.py examples/assets/clip_student --write     # stores evaluation.json beside the weights

Text features are the mean of three templates around the bare class name; no class descriptions, no tuning. An n-way
figure is the mean of 100 seeded draws of n concepts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

ASSETS = Path(__file__).resolve().parent.parent
TEMPLATES = {
    "icons": ("{}", "a {} icon", "an icon of a {}."),
    "emoji": ("{}", "a {} emoji", "an emoji of a {}."),
    "fashion": ("{}", "a photo of a {}.", "a picture of a {}."),
}
STYLES = ("flat", "3d", "high_contrast")
DRAWS = 100


class ZeroShotModel:
    """A model folder with everything needed to encode images and class names.

    Args:
        folder: `CLIPModel` folder with tokenizer and image processor.
    """

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        if len(self.tokenizer) != self.model.config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer in {folder} has {len(self.tokenizer)} tokens, the model expects "
                f"{self.model.config.text_config.vocab_size}."
            )

    @torch.inference_mode()
    def images(self, dataset: Dataset, *, chunk: int = 256) -> torch.Tensor:
        """Unit-norm features (images, dim) of a dataset's images, in order."""
        features = []
        for batch in dataset.iter(chunk):
            pixels = self.processor([image.convert("RGB") for image in batch["image"]], return_tensors="pt")
            features.append(self.model.get_image_features(**pixels).pooler_output)
        return F.normalize(torch.cat(features), dim=-1)

    @torch.inference_mode()
    def classes(self, names: list[str], templates: tuple[str, ...]) -> torch.Tensor:
        """Unit-norm features (classes, dim): the mean over templates of unit-norm text features."""
        total = 0
        for template in templates:
            texts = [template.replace("{}", name) for name in names]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
            total = total + F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        return F.normalize(total, dim=-1)


def accuracy(similarity: torch.Tensor, labels: torch.Tensor, *, top: int = 1) -> float:
    """Share (%) of rows whose label is among the `top` most similar classes."""
    hits = (similarity.topk(top, dim=1).indices == labels[:, None]).any(dim=1)
    return round(100 * hits.float().mean().item(), 2)


def n_way(similarity: torch.Tensor, labels: torch.Tensor, *, ways: int) -> float:
    """Accuracy (%) among `ways` of the classes that occur, mean of seeded draws."""
    present, generator, results = labels.unique(), np.random.default_rng(0), []
    for _ in range(DRAWS):
        chosen = present[generator.choice(len(present), ways, replace=False)]
        rows = torch.isin(labels, chosen)
        results.append((chosen[similarity[rows][:, chosen].argmax(dim=1)] == labels[rows]).float().mean().item())
    return round(100 * float(np.mean(results)), 2)


def load(name: str, split: str) -> Dataset:
    """One committed parquet file."""
    return Dataset.from_parquet(str(ASSETS / name / f"{split}.parquet"))


def evaluate_icons(clip: ZeroShotModel) -> dict[str, float]:
    """All classes, each drawing domain, base and new halves, and the control with permuted class names."""
    data = load("icons", "test")
    names, labels = data.features["label"].names, torch.tensor(data["label"])
    similarity = clip.images(data) @ clip.classes(names, TEMPLATES["icons"]).T
    results = {"all": accuracy(similarity, labels), "all_top5": accuracy(similarity, labels, top=5)}
    domains = np.array(data["domain"])
    for domain in sorted(set(domains)):
        rows = torch.from_numpy(domains == domain)
        results[domain] = accuracy(similarity[rows], labels[rows])
    half = (len(names) + 1) // 2
    results["base"] = accuracy(similarity[labels < half][:, :half], labels[labels < half])
    results["new"] = accuracy(similarity[labels >= half][:, half:], labels[labels >= half] - half)
    results["control_permuted_names"] = accuracy(similarity.roll(half // 2, dims=1), labels)
    return results | {"images": len(data), "chance": round(100 / len(names), 2)}


def evaluate_emoji(clip: ZeroShotModel) -> dict[str, float]:
    """Subgroups on the test split and single concepts on all splits, for each style."""
    results: dict[str, float] = {}
    for style in STYLES:
        suffix = "" if style == "flat" else f"_{style}"
        parts = [load("emoji", f"{split}{suffix}") for split in ("train", "val", "test")]
        names, labels = parts[2].features["label"].names, torch.tensor(parts[2]["label"])
        test = clip.images(parts[2])
        results[f"subgroup_{style}"] = accuracy(test @ clip.classes(names, TEMPLATES["emoji"]).T, labels)
        concepts = parts[0].features["concept"].names
        images = torch.cat([clip.images(parts[0]), clip.images(parts[1]), test])
        everything = concatenate_datasets(parts)
        labels = torch.tensor(everything["concept"])
        similarity = images @ clip.classes(concepts, TEMPLATES["emoji"]).T
        seen = torch.tensor(everything["seen"])
        results[f"concept_all_{style}"] = accuracy(similarity, labels)
        results[f"seen_50way_{style}"] = n_way(similarity[seen], labels[seen], ways=50)
        results[f"seen_100way_{style}"] = n_way(similarity[seen], labels[seen], ways=100)
        results[f"unseen_50way_{style}"] = n_way(similarity[~seen], labels[~seen], ways=50)
    return results | {
        "chance_subgroup": round(100 / len(names), 2),
        "chance_concept_all": round(100 / len(concepts), 2),
    }


def evaluate_fashion(clip: ZeroShotModel) -> dict[str, float]:
    """Ten-way accuracy on the test photos."""
    data = load("fashion", "test")
    names, labels = data.features["label"].names, torch.tensor(data["label"])
    similarity = clip.images(data) @ clip.classes(names, TEMPLATES["fashion"]).T
    return {"all": accuracy(similarity, labels), "images": len(data), "chance": 100 / len(names)}


def evaluate(folder: Path) -> dict[str, dict[str, float]]:
    """All figures (%) of the model in `folder`."""
    clip = ZeroShotModel(folder)
    return {"icons": evaluate_icons(clip), "emoji": evaluate_emoji(clip), "fashion": evaluate_fashion(clip)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="CLIPModel folder")
    parser.add_argument("--write", action="store_true", help="store evaluation.json in the model folder")
    args = parser.parse_args()
    results = evaluate(args.model)
    print(json.dumps(results, indent=1))
    if args.write:
        args.model.joinpath("evaluation.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
