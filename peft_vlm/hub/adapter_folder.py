"""An adapter folder as data: configuration, training summary, evaluation, and missing parts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from peft_vlm.adapters.config import VLMConfig, check_adapter_file, read_config
from peft_vlm.errors import AdapterError
from peft_vlm.files import (
    CONFIG_NAME,
    REPORT_NAME,
    SUMMARY_NAME,
    TRANSFER_NAME,
    WEIGHTS_NAME,
    weights_sha256,
)
from peft_vlm.hub.scores import Evaluation, read_evaluation

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class AdapterFolder:
    """Contents of an adapter folder.

    Args:
        path: The folder.
        config: Configuration.
        num_parameters: Parameters in the weights file.
        finite: True if all of them are finite.
        prompt_image: The adapter as an image; None where there is nothing to see.
        summary: Training summary; None without one.
        evaluation: Evaluation results; None without any.
    """

    path: Path
    config: VLMConfig
    num_parameters: int
    finite: bool
    prompt_image: Image.Image | None
    summary: dict[str, Any] | None
    evaluation: Evaluation | None

    @classmethod
    def read(cls, folder: str | Path) -> "AdapterFolder":
        """Read a folder that `VLMTrainer`, `save_pretrained` or a converter wrote.

        Args:
            folder: Local folder.

        Raises:
            AdapterError: If it holds no adapter of this package, or a damaged one.
        """
        path = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                raise AdapterError(
                    f"Expected {name!r} in {str(folder)!r}, got none. Pass the folder that `save_pretrained` or the "
                    "trainer wrote; an adapter that is not called `default` is in a subfolder of its name."
                )
        check_adapter_file(path)
        config = read_config(path)
        if not isinstance(config, VLMConfig):
            raise AdapterError(
                f"Expected an adapter of peft_vlm in {str(folder)!r}, got one of PEFT's {config.peft_type.value!r}. "
                "Publish it with PEFT's own `push_to_hub`."
            )
        tensors = load_file(path / WEIGHTS_NAME)
        summary = path / SUMMARY_NAME
        return cls(
            path,
            config,
            sum(tensor.numel() for tensor in tensors.values()),
            all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()),
            config.prompt_image(tensors),
            json.loads(summary.read_text("utf-8")) if summary.is_file() else None,
            read_evaluation(path),
        )

    @property
    def method(self) -> str:
        """Registered name of the method."""
        return self.config.peft_type.value.lower()

    def missing(self, *, license: str | None, base_model: str | None) -> list[str]:
        """Parts that a published adapter needs and this folder lacks, as ends of the sentence "Expected ...".

        Args:
            license: Licence that it is to be published under.
            base_model: Hub id of the base model; None for what the configuration names.
        """
        base = base_model or self.config.base_model_name_or_path
        evaluated = self.evaluation is not None and self.evaluation.weights_sha256
        problems = []
        if not self.finite:
            problems.append("finite weights, got NaN or infinity: the training has failed")
        if self.summary is None:
            problems.append(f"{SUMMARY_NAME!r}, which the trainer writes: without it, nobody knows the settings")
        if self.evaluation is None:
            problems.append(
                f"an evaluation ({REPORT_NAME!r} with its baseline, or {TRANSFER_NAME!r}): run `peft-vlm evaluate "
                "--baseline --adapter FOLDER --output_dir FOLDER ...`"
            )
        elif evaluated and evaluated != weights_sha256(self.path):
            problems.append(f"an evaluation of these weights, got one of others in {REPORT_NAME!r}: evaluate again")
        if not base or not HUB_ID.fullmatch(base) or (base_model is None and Path(base).exists()):
            problems.append(f"a base model that others can load, got {base!r}: pass `base_model=` with its Hub id")
        if not license:
            problems.append("a licence: pass `license=`, for example 'apache-2.0'")
        return problems
