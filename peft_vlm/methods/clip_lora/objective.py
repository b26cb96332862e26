"""CLIP-LoRA's objective: cross-entropy over class prompts, the class features computed again in every step.

Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024, arXiv 2405.18541.
"""

from peft_vlm.classification import ClassificationObjective
from peft_vlm.objective import Paper

PAPER = Paper(
    title="Low-Rank Few-Shot Adaptation of Vision-Language Models",
    year=2024,
    arxiv_id="2405.18541",
    venue="CVPR Workshops 2024",
    bibtex="""@inproceedings{zanella2024low,
  title     = {Low-Rank Few-Shot Adaptation of Vision-Language Models},
  author    = {Zanella, Maxime and Ben Ayed, Ismail},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year      = {2024}
}""",
)


class CLIPLoRAObjective(ClassificationObjective):
    """Cross-entropy over all classes with a LoRA in one tower or both: `ClassificationObjective` as it is.

    Requirements:
        A `PeftModel` with an active LoRA (`peft.LoraConfig`); the rest as for its base.

    Relations:
        Any other adapter of PEFT trains with `ClassificationObjective` itself.

    Deviation: The official code multiplies cosines by the constant 100, the scale of OpenAI's CLIPs. Here it is the
        model's own scale, so that training and use agree on every base model.

    References:
        arXiv 2405.18541, Sec. 3.
    """

    paper = PAPER
