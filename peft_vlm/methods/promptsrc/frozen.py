"""What the frozen model says: the targets of PromptSRC's consistency terms."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.text.class_features import evaluation_mode
from peft_vlm.text.prompts import ClassPrompts
from peft_vlm.towers import towers_of


@torch.no_grad()
def frozen_class_features(
    model: nn.Module, prompts: ClassPrompts, *, chunk_size: int = 256
) -> Float[Tensor, "classes dim"]:
    """Text features of the model without its adapter: mean over the templates, then normalised once, in float32.

    Zero-shot ensembles (`peft_vlm.text.encode_classes`) also normalise before the mean; the official code of PromptSRC
    does not, which moves the features by 2e-3.

    Args:
        model: `PeftModel`; its adapter is switched off for this pass.
        prompts: Plain class prompts, with any number of templates.
        chunk_size: Prompts per forward pass.
    """
    towers, num_classes = towers_of(model), len(prompts.class_names)
    input_ids = prompts.input_ids.to(next(towers.model.parameters()).device)
    with evaluation_mode(model), model.disable_adapter():
        chunks = [towers.finish_text(towers.embed_text(ids), ids, 0).float() for ids in input_ids.split(chunk_size)]
    features = torch.cat(chunks).unflatten(0, (-1, num_classes)).mean(dim=0)
    return nn.functional.normalize(features, dim=-1)
