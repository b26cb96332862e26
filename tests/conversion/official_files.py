"""Files that the official trainers wrote (official/README.md), and adapters made of them."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from peft_vlm.evaluation.classify import TextClassifier
from tests.parity.recorded import recorded_clip, recorded_tokenizer

FOLDER = Path(__file__).parent / "official"


def official(name: str) -> Path:
    """Path of an official file."""
    return FOLDER / f"{name}.pth.tar"


def official_tensors(name: str) -> dict[str, Tensor]:
    """Tensors of an official file as torch itself reads them."""
    return torch.load(official(name), weights_only=True)["state_dict"]


def adapter(folder: Path, *, clip: str = "weights_student") -> PeftModel:
    """An adapter folder on its recorded CLIP."""
    return PeftModel.from_pretrained(recorded_clip(clip), folder).eval()


def logits(model: PeftModel, pixels: Tensor) -> Tensor:
    """What a user's classifier gives for the classes and the template that the adapter records."""
    config = model.active_peft_config
    classifier = TextClassifier(model, recorded_tokenizer(), template=config.template)
    return classifier.logits_for(tuple(config.class_names))(pixels).detach()
