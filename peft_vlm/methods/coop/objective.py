"""CoOp's objective: cross-entropy of the prompted class features against frozen image features.

Learning to Prompt for Vision-Language Models, 2022, arXiv 2109.01134.
"""

from peft_vlm.classification import ClassificationObjective
from peft_vlm.objective import Paper

PAPER = Paper(
    title="Learning to Prompt for Vision-Language Models",
    year=2022,
    arxiv_id="2109.01134",
    venue="IJCV 2022",
    bibtex="""@article{zhou2022learning,
  title   = {Learning to Prompt for Vision-Language Models},
  author  = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  journal = {International Journal of Computer Vision},
  year    = {2022}
}""",
)


class CoOpObjective(ClassificationObjective):
    """Cross-entropy over all classes with a learned context: `ClassificationObjective` as it is.

    Requirements:
        A `PeftModel` with an active CoOp adapter; the rest as for its base.

    Relations:
        PromptSRC with `num_vision_tokens=0`, `text_depth=1` and all weights 0; KgCoOp with weight 0.

    References:
        arXiv 2109.01134, Eq. (2) and (3).
    """

    paper = PAPER
