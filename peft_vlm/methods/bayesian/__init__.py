"""Bayesian prompt learning (ICCV 2023): a context with learned uncertainty, whose predictions are averaged."""

from peft_vlm.methods.bayesian.config import BayesianConfig
from peft_vlm.methods.bayesian.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.bayesian.model import BayesianModel
from peft_vlm.methods.bayesian.objective import PAPER, BayesianObjective, preset_for, recommended
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="bayesian",
        config=BayesianConfig,
        tuner=BayesianModel,
        title="Bayesian prompts",
        trained="context vectors in every class prompt, and the distribution of a vector that is added to all of them",
        paper=PAPER,
        limits=(
            "Predictions average the probabilities of `num_samples` class prompts, drawn with the recorded seed.",
            "It has no one set of class features, so the model's own forward refuses and it cannot be exported; use "
            "`PromptedClassifier`.",
        ),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="bayesian",
        title="Bayesian prompts",
        adapter="bayesian",
        paper=PAPER,
        objective=BayesianObjective,
        preset_for=preset_for,
        presets=("base_to_new",),
        recommended=recommended,
    )
)

__all__ = [
    "BayesianConfig",
    "BayesianModel",
    "BayesianObjective",
    "convert_checkpoint",
    "preset_for",
]
