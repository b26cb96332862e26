"""ATPrompt's objective: CoOp's cross-entropy with attribute words before the context.

ATPrompt: Textual-based Attribute Prompting for Vision-Language Models, 2025, arXiv 2412.09442.
"""

from typing import Any

from peft import PeftModel
from torch import nn

from peft_vlm.adapters.context import AttributeContextConfig
from peft_vlm.classification import ClassificationObjective
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import check_choice, shown
from peft_vlm.objective import Paper
from peft_vlm.registry import Preset, RunSize, sgd_training

PAPER = Paper(
    title="Advancing Textual Prompt Learning with Anchored Attributes",
    year=2025,
    arxiv_id="2412.09442",
    venue="ICCV 2025",
    bibtex="""@inproceedings{li2025advancing,
  title     = {Advancing Textual Prompt Learning with Anchored Attributes},
  author    = {Li, Zheng and Song, Yibing and Cheng, Ming-Ming and Li, Xiang and Yang, Jian},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2025}
}""",
)


class ATPromptObjective(ClassificationObjective):
    """Cross-entropy over all classes with attribute words in the prompts: `ClassificationObjective` as it is.

    Requirements:
        A `PeftModel` with an active CoOp, MaPLe or PromptSRC adapter with `attributes`; the rest as for its base. A
        CoCoOp adapter with `attributes` trains with `CoCoOpObjective`.

    Relations:
        CoOp where there are no attributes.

    References:
        arXiv 2412.09442, Eq. (4); (5) and (6) with MaPLe's adapter.
    """

    paper = PAPER

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Check that there are attributes, beside what its base prepares.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images; the classes come from the prompts.

        Raises:
            ValueError: If the adapter has no attributes.
        """
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        if not isinstance(config, AttributeContextConfig) or not config.before:
            raise ValueError(
                f"Expected an adapter with attribute words, got {shown(type(config).__name__)} without. Pass "
                '`CoOpConfig(attributes=["color", "shape"])`.'
            )
        super().prepare(model, dataset)


# Hyper-parameters of the official ATPrompt runs (zhengli97/ATPrompt, commit 86980a1), and its attribute words.

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
    training = sgd_training(learning_rate=rate, batch=batch, epochs=epochs)
    return Preset(config=config | ({"depth": 9} if base == "maple" else {}), training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate, and words to start from.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for("caltech101"), rate=0.002, config={"context_init": "a photo of a"})
