"""CoCoOp's objective: cross-entropy over class prompts that are computed anew for every image.

Conditional Prompt Learning for Vision-Language Models, 2022, arXiv 2203.05557.
"""

from torch import nn

from peft_vlm.classification import ClassificationObjective
from peft_vlm.errors import check_choice
from peft_vlm.objective import Batch, ObjectiveOutput, Paper
from peft_vlm.registry import Preset, RunSize, sgd_training
from peft_vlm.text.class_features import conditioned_logits

PAPER = Paper(
    title="Conditional Prompt Learning for Vision-Language Models",
    year=2022,
    arxiv_id="2203.05557",
    venue="CVPR 2022",
    bibtex="""@inproceedings{zhou2022conditional,
  title     = {Conditional Prompt Learning for Vision-Language Models},
  author    = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}""",
)


class CoCoOpObjective(ClassificationObjective):
    """Mean cross-entropy of scaled cosines, with one text pass over all classes for every image.

    Formula: L = mean_i CE(exp(scale) * cos(f(x_i), g(context + h(f(x_i) / |f(x_i)|), name_c)), y_i), h: meta-net

    The text passes are recomputed in the backward pass one by one, so that memory does not grow with the batch.

    Requirements:
        A `PeftModel` with an active CoCoOp adapter; the rest as for its base.

    Relations:
        CoOp where the meta-net gives zeros.

    References:
        arXiv 2203.05557, Eq. (3).
    """

    paper = PAPER

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Compute the loss over all classes.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `labels`, and `index` into the stored features or `pixel_values`.

        Returns:
            `cross_entropy`, and the logits.
        """
        features = self._image_features(model, batch)
        logits = conditioned_logits(model, self.prompts, features)  # (batch, classes), a text pass per image
        terms = {"cross_entropy": nn.functional.cross_entropy(logits, batch["labels"])}
        return ObjectiveOutput(terms, logits, batch["labels"])


# Hyper-parameters of the official CoCoOp runs (KaiyangZhou/CoOp: `configs/trainers/CoCoOp`).
def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return the official preset: four vectors from "a photo of a", SGD at 0.002, batch 1, 10 epochs.

    Args:
        protocol: `"base_to_new"` (`vit_b16_c4_ep10_batch1_ctxv1.yaml`, 16 shots).
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = sgd_training(learning_rate=0.002, batch=1, epochs=10)
    return Preset(config={"num_text_tokens": 4, "context_init": "a photo of a"}, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.01, batch=8, config={"context_init": "a photo of a"})
