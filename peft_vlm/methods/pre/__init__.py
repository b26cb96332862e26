"""PRE (2023): CoOp's context, encoded by a network while it is trained; it trains a CoOp adapter."""

from peft_vlm.methods.pre.objective import PAPER, PREObjective, preset_for, recommended
from peft_vlm.registry import TrainingMethod, register_method

register_method(
    TrainingMethod(
        name="pre",
        title="PRE",
        adapter="coop",
        paper=PAPER,
        objective=PREObjective,
        preset_for=preset_for,
        presets=("base_to_new",),
        recommended=recommended,
        defaults={"network": "lstm"},
    )
)

__all__ = ["PREObjective", "preset_for"]
