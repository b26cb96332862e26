"""What the frozen model says: the targets of PromptSRC's consistency terms."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.distributed import divided
from peft_vlm.models.towers import towers_of
from peft_vlm.text.class_features import evaluation_mode
from peft_vlm.text.prompts import ClassPrompts


@torch.no_grad()
def frozen_class_features(
    model: nn.Module, prompts: ClassPrompts, *, chunk_size: int = 256
) -> Float[Tensor, "classes dim"]:
    """Text features of the model without its adapter: mean over the templates, then normalised once, in float32.

    Zero-shot ensembles (`peft_vlm.text.encode_classes`) also normalise before the mean; the official code of PromptSRC
    does not, which moves the features by 2e-3.

    Args:
        model: `PeftModel`; its adapter is switched off for this pass.
        prompts: Plain class prompts, divided among the processes of the training, with any number of templates.
        chunk_size: Prompts per forward pass.
    """
    towers, num_classes = towers_of(model), len(prompts.class_names)
    input_ids = prompts.input_ids.to(next(towers.model.parameters()).device)

    def features_of(rows: Int[Tensor, " rows"]) -> Tensor:
        ids = input_ids[rows]
        return towers.finish_text(towers.embed_text(ids), ids, 0).float()

    with evaluation_mode(model), model.disable_adapter():
        features = divided(len(input_ids), features_of, chunk_size=chunk_size)
    features = features.unflatten(0, (-1, num_classes)).mean(dim=0)
    return nn.functional.normalize(features, dim=-1)
