"""Reads the tensors recorded from the official codes (see reference/README.md).

Where a parity test gives no reason of its own, its tolerance is that of the record: 5 to 100 times the error of an
independent Hugging Face implementation that read the same tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from peft_vlm.adapters.learned_tokens import LearnedTokens
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.models.towers import unwrap
from peft_vlm.training.schedule import epoch_cosine_scheduler

FOLDER = Path(__file__).parent / "reference"


def tensors(name: str) -> dict[str, Tensor]:
    """Tensors of a case."""
    return load_file(FOLDER / f"{name}.safetensors")


def facts(name: str) -> dict[str, Any]:
    """Description of a case."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def recorded_clip(name: str) -> CLIPModel:
    """The tiny CLIP a case was recorded on."""
    config = {key: value for key, value in facts(name)["hf_config"].items() if key != "transformers_version"}
    model = CLIPModel(CLIPConfig.from_dict(config))
    model.load_state_dict(tensors(name), strict=True)
    return model.eval()


class RecordedImages(ImageClassificationDataset):
    """A dataset whose pixel values are given tensors, so that no image processing stands between us and the record."""

    def __init__(self, pixel_values: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
        rows = [{"image": Image.new("RGB", (1, 1)), "label": int(label)} for label in labels]
        super().__init__(rows, class_names)
        self.pixel_values = pixel_values

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index], "index": index}


def batch_of(dataset: RecordedImages, indices: list[int]) -> dict[str, Tensor]:
    """A batch of given positions, without pixels."""
    return {"index": torch.tensor(indices), "labels": torch.tensor([dataset.labels[i] for i in indices])}


def recorded_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the cases of the PromptKD family: 642 of CLIP's tokens."""
    parts = facts("compact_tokenizer")
    return CLIPTokenizer(vocab=parts["vocab"], merges=[tuple(merge.split()) for merge in parts["merges"]])


def assert_close_to_max(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest error at most a share of the largest expected entry."""
    assert_close(actual, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


def prompt_tensors(model: nn.Module, *, prefix: str) -> dict[str, list[nn.Parameter]]:
    """Trained prompts of a model by their recorded names; deep ones one tensor per layer."""
    base = unwrap(model)
    name = f"{prefix}prompt"

    def deep(layers: nn.ModuleList) -> list[nn.Parameter]:
        return [getattr(layer, name)["default"] for layer in layers if isinstance(layer, LearnedTokens)]

    found = {"text_deep": deep(base.text_model.encoder.layers), "vision_deep": deep(base.vision_model.encoder.layers)}
    if isinstance(base.text_model.embeddings.token_embedding, LearnedTokens):
        found["text_ctx"] = [getattr(base.text_model.embeddings.token_embedding, name)["default"]]
    if isinstance(base.vision_model.embeddings, LearnedTokens):
        found["vision_shallow"] = [getattr(base.vision_model.embeddings, name)["default"]]
    return {key: tensors for key, tensors in found.items() if tensors}


@torch.no_grad()
def load_prompts(model: nn.Module, recorded: dict[str, Tensor], *, prefix: str, group: str = "in") -> None:
    """Put recorded prompts into a model."""
    for name, parameters in prompt_tensors(model, prefix=prefix).items():
        values = recorded[f"{group}.{name}"]
        values = values if values.ndim == 3 else values[None]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def stacked(parameters: list[Tensor | None], like: Tensor) -> Tensor:
    """Tensors of some layers in the recorded layout."""
    stack = torch.stack([tensor.detach() for tensor in parameters if tensor is not None])
    return stack if like.ndim == 3 else stack[0]


def official_run(
    parameters: Iterable[Tensor], hyper: Mapping[str, Any], losses: Iterator[Tensor]
) -> tuple[list[float], list[float]]:
    """Train as the recorded code does: SGD, and a cosine per epoch after one of warm-up.

    Args:
        parameters: What trains.
        hyper: The case's `optimiser`.
        losses: Loss of each step, computed when it is asked for.

    Returns:
        Loss and learning rate of every step.
    """
    options = {"momentum": hyper["momentum"], "weight_decay": hyper["weight_decay"]}
    optimizer = torch.optim.SGD(list(parameters), lr=hyper["lr"], **options)
    schedule = epoch_cosine_scheduler(
        optimizer,
        steps_per_epoch=hyper["batches_per_epoch"],
        num_epochs=hyper["epochs"],
        warmup_epochs=hyper["warmup_epochs"],
        warmup_rate=hyper["warmup_lr"],
    )
    values, rates = [], []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        values.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values, rates
