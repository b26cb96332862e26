"""Hyper-parameters of the official ATPrompt runs (zhengli97/ATPrompt, commit 86980a1), and its attribute words."""

from typing import Any

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

#: Attribute words by data set, as found by the authors' search. Those of ImageNet serve its variants as well.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "imagenet": ("color", "shape"),
    "caltech101": ("shape", "size"),
    "oxford_pets": ("playfulness", "energy"),
    "stanford_cars": ("luxury",),
    "oxford_flowers": ("color", "habitat", "growth"),
    "food101": ("flavor", "preparation"),
    "fgvc_aircraft": ("design", "range"),
    "sun397": ("function",),
    "dtd": ("pattern", "color", "design"),
    "eurosat": ("habitat",),
    "ucf101": ("precision",),
}

#: Settings of a new adapter where nothing else is said: ImageNet's words, which are the least particular.
CONFIG: dict[str, Any] = {"attributes": list(ATTRIBUTES["imagenet"]), "num_text_tokens": 2, "context_init": None}

#: Vectors per attribute and of the context, where they are not 2 (CoOp, CoCoOp) or 4 (MaPLe).
_TOKENS = {
    "coop": {"dtd": 4},
    "cocoop": {"ucf101": 4, "stanford_cars": 6, "oxford_flowers": 6, "eurosat": 6},
    "maple": {"fgvc_aircraft": 2, "ucf101": 2},
}
#: Data sets that MaPLe trains 10 epochs on, not 5.
_TEN_EPOCHS = ("caltech101", "oxford_pets", "oxford_flowers", "eurosat")


def preset_for(dataset: str = "imagenet", *, base: str = "coop", protocol: str = "base_to_new") -> Preset:
    """Return an official preset: the words of a data set, random vectors, SGD.

    Args:
        dataset: Key of `ATTRIBUTES`.
        base: Adapter that the words are put into: `"coop"` (100 epochs, batch 32), `"cocoop"` (10 epochs, batch 1) or
            `"maple"` (depth 9, 5 or 10 epochs, batch 4).
        protocol: `"base_to_new"` (16 shots), or `"cross_dataset"`, which the authors train on ImageNet: 4 vectors, and
            10 (`"coop"`), 5 (`"cocoop"`) or 2 (`"maple"`) epochs.
    """
    check_choice("dataset", dataset, tuple(ATTRIBUTES))
    check_choice("base", base, tuple(_TOKENS))
    check_choice("protocol", protocol, ("base_to_new", "cross_dataset"))
    count = _TOKENS[base].get(dataset, 4 if base == "maple" else 2)
    batch, rate, epochs = {"coop": (32, 0.002, 100), "cocoop": (1, 0.002, 10), "maple": (4, 0.0035, 5)}[base]
    if base == "maple" and dataset in _TEN_EPOCHS:
        epochs = 10
    if base == "coop" and dataset == "imagenet":
        epochs = 10
    if protocol == "cross_dataset":
        count, epochs = 4, {"coop": 10, "cocoop": 5, "maple": 2}[base]
    config: dict[str, Any] = {"attributes": list(ATTRIBUTES[dataset]), "num_text_tokens": count, "context_init": None}
    training = {"optim": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": batch, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    return Preset(config=config | ({"depth": 9} if base == "maple" else {}), training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate, and words to start from.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for("caltech101"), rate=0.002, config={"context_init": "a photo of a"})
