"""Adapter weights and objective state on disk."""

from pathlib import Path

from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from peft_vlm.adapters.config import check_adapter_file
from peft_vlm.errors import AdapterError
from peft_vlm.objective import Objective
from peft_vlm.training.module import TrainingModule

OBJECTIVE_STATE_NAME = "objective_state.safetensors"


def save_weights(module: TrainingModule, folder: Path) -> None:
    """Save the active adapter, or the whole model when nothing is wrapped, as safetensors.

    Args:
        module: Model and objective.
        folder: Target; PEFT puts an adapter that is not named `default` into a subfolder of its name.
    """
    model = module.model
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=list(model.active_adapters))
    else:
        model.save_pretrained(folder)


def load_weights(module: TrainingModule, folder: Path) -> None:
    """Load what `save_weights` wrote into the model, under the name of the active adapter.

    Args:
        module: Model and objective.
        folder: Checkpoint folder.

    Raises:
        AdapterError: If the folder holds no such adapter, or a damaged one.
    """
    model = module.model
    if not isinstance(model, PeftModel):
        state = AutoModel.from_pretrained(folder, local_files_only=True).state_dict()
        model.load_state_dict(state)
        return
    (name,) = model.active_adapters
    folder = folder if name == "default" else folder / name
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"Expected the adapter {name!r} in {str(folder)!r}, got no adapter_model.safetensors there. The "
            f"checkpoint is "
            "incomplete or of a run with another adapter name."
        )
    check_adapter_file(folder)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)


def save_objective_state(state: dict[str, Tensor], folder: Path) -> None:
    """Save what the objective needs for an exact resume.

    Args:
        state: Mapping of `Objective.state_dict`.
        folder: Checkpoint folder.
    """
    if state:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / OBJECTIVE_STATE_NAME)


def load_objective_state(objective: Objective, folder: Path) -> None:
    """Restore the objective from a checkpoint.

    Args:
        objective: The run's objective.
        folder: Checkpoint folder.

    Raises:
        AdapterError: If the objective has state and the file is missing.
    """
    path = folder / OBJECTIVE_STATE_NAME
    if not path.is_file():
        if objective.state_dict():
            raise AdapterError(
                f"Expected {OBJECTIVE_STATE_NAME!r} in {str(folder)!r}, got none. The checkpoint is "
                f"incomplete or of another "
                "objective; an exact resume is not possible from it."
            )
        return
    objective.load_state_dict(load_file(path))
