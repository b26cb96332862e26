"""MaPLe's objective: cross-entropy with learned tokens in both towers.

MaPLe: Multi-modal Prompt Learning, 2022, arXiv 2210.03117.
"""

from peft_vlm.classification import ClassificationObjective
from peft_vlm.objective import Paper

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
