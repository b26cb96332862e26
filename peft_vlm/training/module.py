"""The one module that the trainer wraps: model and objective together, so that DDP sees every forward pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peft_vlm.distributed import left_out, num_processes, share_of
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.sharding import has_sharded_layers, shard_frozen_layers, sharded_names
from peft_vlm.models.towers import unwrap
from peft_vlm.objective import Batch, Objective
from peft_vlm.training.inputs import FILLER
from peft_vlm.training.metrics import mean_cross_entropy


class TrainingModule(nn.Module):
    """`forward(batch)` gives the loss and its terms; in evaluation mode the loss and the logits over all classes.

    Calling the unwrapped model from a loss function would bypass the gradient averaging of DDP without any error.

    Args:
        model: `PeftModel`, or a plain model for full fine-tuning.
        objective: What is minimised; not a submodule.
    """

    #: Read by transformers' trainer, which takes `**batch` for a sign that the loss of accumulated batches is already
    #: divided by their number, and would sum them.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def config(self) -> Any:
        """Configuration of the inner model, which transformers and DeepSpeed read."""
        return unwrap(self.model).config

    @property
    def hf_device_map(self) -> Any:
        """Places of the base model's parts, where it was loaded with `device_map`: transformers then moves nothing."""
        return unwrap(self.model).hf_device_map

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Run the objective on one batch; keyword arguments are its columns.

        In evaluation mode: logits as a user of the trained model gets them, and their cross-entropy.

        With several processes every term is scaled by this process's share of the rows that it is the mean of. The
        mean over the processes, which DDP takes of gradients and the log of terms, is then that over all rows, also
        where the last batch of an epoch divides unevenly.
        """
        if not self.training:
            logits = self.objective.predict(self.model, cast(Batch, batch))
            return {"loss": mean_cross_entropy(logits, batch["labels"]), "logits": logits}
        with left_out(batch.pop(FILLER, None) is not None):
            output = self.objective(self.model, cast(Batch, batch))
            share = share_of(torch.tensor(float(len(output.labels)), device=output.labels.device))
        scale = 1.0 if output.terms_are_shared or num_processes() == 1 else share
        terms = {f"loss_{name}": scale * term for name, term in output.loss_terms.items()}
        outputs = {"loss": torch.stack(list(terms.values())).sum()} | {k: v.detach() for k, v in terms.items()}
        counts = (output.labels >= 0) & (share > 0)
        correct = counts & (output.logits.detach().argmax(dim=-1) == output.labels)
        return outputs | {"correct": correct.sum(), "labelled": counts.sum()}

    def sharded(self, args: Any) -> "TrainingModule":
        """Divide the frozen layers among the processes, if the run says so, and hide them from DDP; this module.

        Args:
            args: Settings of the run.

        Raises:
            UnsupportedModelError: If an earlier run has divided layers, and this one does not.
        """
        if not args.has_sharded_layers and has_sharded_layers(self.model):
            raise UnsupportedModelError(
                "Expected a whole model, got one whose layers an earlier run has divided among the processes. Train "
                "it with `fsdp=True` too, or load the base model again."
            )
        if args.has_sharded_layers:
            shard_frozen_layers(self.model, args.device)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, sharded_names(self))
        return self

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute layer activations in the backward pass, in both towers."""
        unwrap(self.model).activation_checkpointing_enable(**kwargs)
