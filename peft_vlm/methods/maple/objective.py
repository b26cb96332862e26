"""MaPLe's objective: cross-entropy with learned tokens in both towers.

MaPLe: Multi-modal Prompt Learning, 2022, arXiv 2210.03117.
"""

from peft_vlm.classification import ClassificationObjective
from peft_vlm.errors import check_choice
from peft_vlm.objective import Paper
from peft_vlm.registry import Preset, RunSize, sgd_training

PAPER = Paper(
    title="MaPLe: Multi-modal Prompt Learning",
    year=2022,
    arxiv_id="2210.03117",
    venue="CVPR 2023",
    bibtex="""@inproceedings{khattak2023maple,
  title     = {{MaPLe}: Multi-modal Prompt Learning},
  author    = {Khattak, Muhammad Uzair and Rasheed, Hanoona and Maaz, Muhammad and Khan, Salman
               and Khan, Fahad Shahbaz},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023}
}""",
)


class MaPLeObjective(ClassificationObjective):
    """Cross-entropy over all classes with coupled prompts: `ClassificationObjective` as it is.

    Requirements:
        A `PeftModel` with an active MaPLe adapter; the rest as for its base.

    Relations:
        PromptSRC with all weights 0, but for the projections that tie the vision tokens to the text tokens.

    References:
        arXiv 2210.03117, Eq. (1) to (6).
    """

    paper = PAPER


# Hyper-parameters of the official MaPLe runs (muzairkhattak/multimodal-prompt-learning: `configs/trainers/MaPLe`).

#: Depth, epochs and learning rate: `vit_b16_c2_ep5_batch4_2ctx`, and the same with `_cross_datasets`.
PROTOCOLS: dict[str, tuple[int, int, float]] = {"base_to_new": (9, 5, 0.0035), "cross_dataset": (3, 2, 0.0026)}


def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return an official preset: two vectors that start as "a photo", SGD, batch 4.

    Args:
        protocol: `"base_to_new"` or `"cross_dataset"`.
    """
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    depth, epochs, rate = PROTOCOLS[protocol]
    training = sgd_training(learning_rate=rate, batch=4, epochs=epochs)
    config = {"num_text_tokens": 2, "depth": depth, "context_init": "a photo of a"}
    return Preset(config=config, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own depth and rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.01, config={"context_init": "a photo of a"})
