"""The part that objectives on class prompts share: evaluation as a user of the trained model gets it."""

from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.objective import Objective
from peft_vlm.shapes import Batch
from peft_vlm.text.class_features import ClassFeatureCache
from peft_vlm.text.prompts import ClassPrompts


class PromptObjective(Objective):
    """An objective whose model classifies with the features of class prompts.

    Args:
        prompts: Tokenised class prompts.
    """

    def __init__(self, prompts: ClassPrompts) -> None:
        self.prompts = prompts
        self._class_features = ClassFeatureCache()

    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits over all classes by the full model on pixels; class features are computed once per state of the
        model.

        Args:
            model: The model under evaluation.
            batch: `pixel_values`.
        """
        features = self._class_features.get(model, self.prompts)
        return towers_of(model).similarity_logits(image_features(model, batch["pixel_values"]), features)
