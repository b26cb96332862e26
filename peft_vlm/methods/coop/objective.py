"""CoOp's objective: cross-entropy of the prompted class features against frozen image features.

Learning to Prompt for Vision-Language Models, 2022, arXiv 2109.01134.
"""

from typing import Any

from peft_vlm.classification import ClassificationObjective
from peft_vlm.errors import check_choice, check_number
from peft_vlm.objective import Paper
from peft_vlm.registry import Preset, RunSize, sgd_training

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


# Hyper-parameters of the official CoOp runs; the objective has nothing to set.

CONFIGS: dict[str, dict[str, Any]] = {
    "random": {"num_text_tokens": 16, "context_init": None},
    "words": {"num_text_tokens": 4, "context_init": "a photo of a"},  # *_ctxv1.yaml
}
"""`"random"`: the paper's 16 vectors; `"words"`: the four of the base-to-new comparisons."""


def preset_for(context: str = "random", *, shots: int, imagenet: bool = False) -> Preset:
    """An official preset: SGD at 0.002, batch 32, 50 epochs for 1 shot, 100 up to 4, 200 above; ImageNet always 50.

    Args:
        context: Key of `CONFIGS`.
        shots: Images per class.
        imagenet: Train 50 epochs whatever the number of shots (Sec. 4.1).

    Raises:
        ValueError: If there is no shot.
    """
    check_choice("context", context, sorted(CONFIGS))
    check_number("shots", shots, least=1)
    epochs = 50 if shots == 1 or imagenet else 100 if shots <= 4 else 200
    training = sgd_training(learning_rate=0.002, batch=32, epochs=epochs)
    return Preset(config=dict(CONFIGS[context]), training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the random context of the few-shot runs; on a small model four words.

    Args:
        run: Size of the run.
    """
    official = preset_for("random", shots=max(1, min(run.fewest, 16)))
    return run.recommend(official, rate=0.05, config={"context_init": "a photo of a"})
