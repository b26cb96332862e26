"""PRE's objective: CoOp's cross-entropy with a context that a network encodes, collapsed at the end of the run.

PRE: Vision-Language Prompt Learning with Reparameterization Encoder, 2023, arXiv 2309.07760.
"""

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from peft_vlm.adapters.learned_tokens import EncodedContext
from peft_vlm.classification import ClassificationObjective
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import check_choice
from peft_vlm.models.towers import towers_of
from peft_vlm.objective import Paper
from peft_vlm.registry import Preset, RunSize, sgd_training

if TYPE_CHECKING:
    from transformers import TrainerCallback

PAPER = Paper(
    title="PRE: Vision-Language Prompt Learning with Reparameterization Encoder",
    year=2023,
    arxiv_id="2309.07760",
    venue="arXiv",
    bibtex="""@article{minh2023pre,
  title   = {{PRE}: Vision-Language Prompt Learning with Reparameterization Encoder},
  author  = {Minh, Anh Pham Thi and Nguyen, An Duc and Tzimiropoulos, Georgios},
  journal = {arXiv preprint arXiv:2309.07760},
  year    = {2023}
}""",
)


class PREObjective(ClassificationObjective):
    """Cross-entropy over all classes with the context E(v) + v, E: a bidirectional LSTM or a perceptron.

    Checkpoints hold vectors and network, for an exact resume. At the end of the run the encoded context takes the
    place of the vectors, and the network goes: the result is an ordinary CoOp adapter with the same outputs.

    Requirements:
        A `PeftModel` with an active CoOp adapter that has a `network`; the rest as for its base.

    Relations:
        CoOp where the network gives zeros.

    References:
        arXiv 2309.07760, Sec. 3.
    """

    paper = PAPER

    def prepare(self, model: nn.Module, dataset: ImageClassificationDataset | ImageStream) -> None:
        """Check that there is a network, beside what its base prepares.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images; the classes come from the prompts.

        Raises:
            ValueError: If the adapter has no network.
        """
        if isinstance(model, PeftModel) and model.active_peft_config.network is None:
            raise ValueError(
                "Expected a CoOp adapter with a network to train, got `network`=None. Pass "
                '`CoOpConfig(network="lstm")`; an adapter whose training has ended is an ordinary CoOp adapter.'
            )
        super().prepare(model, dataset)

    def callbacks(self, model: nn.Module) -> "list[TrainerCallback]":
        """The collapse at the end of the run, before the final files are written.

        Args:
            model: `PeftModel` with the active adapter.
        """
        from transformers import TrainerCallback  # here: it imports PEFT, which imports this file

        class Collapse(TrainerCallback):
            """Puts the encoded context in the place of the vectors."""

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                layer = towers_of(model).token_embedding
                assert isinstance(layer, EncodedContext), "a CoOp adapter is active"
                assert isinstance(model, PeftModel), "it has an active adapter"
                layer.collapse(model.active_adapter)
                model.active_peft_config.network = None

        return [Collapse()]


# Hyper-parameters of the official PRE runs (minhanh151/PRE, commit 08be703).
def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return the official preset: LSTM, four vectors from "a photo of a", SGD at 0.002, batch 32, 50 epochs.

    Args:
        protocol: `"base_to_new"`, the protocol of the official scripts (16 shots).
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = sgd_training(learning_rate=0.002, batch=32, epochs=50)
    config = {"num_text_tokens": 4, "context_init": "a photo of a", "network": "lstm"}
    return Preset(config=config, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.02, config={"context_init": "a photo of a"})
