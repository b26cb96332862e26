"""ATPrompt's objective: CoOp's cross-entropy with attribute words before the context.

ATPrompt: Textual-based Attribute Prompting for Vision-Language Models, 2025, arXiv 2412.09442.
"""

from peft import PeftModel
from torch import nn

from peft_vlm.adapters.context import AttributeContextConfig
from peft_vlm.classification import ClassificationObjective
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import shown
from peft_vlm.objective import Paper

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
            dataset: Not used; the classes come from the prompts.

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
