"""transformers' image classification pipelines with adapters of this package; all other models are left to them.

`zero-shot-image-classification` tokenises labels without the places that learned context takes, and
`image-classification` expects a classification head. Both are extended for models that have an active adapter of this
package.
"""

from functools import wraps
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModel, BatchEncoding, pipelines
from transformers.pipelines import ImageClassificationPipeline, ZeroShotImageClassificationPipeline

from peft_vlm.adapters.config import VLMConfig, read_config
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.text.prompts import reserve_slots, slots_of, tokenize_for_model

#: The template of `zero-shot-image-classification`.
TEMPLATE = "This is a photo of {}."


def extend_pipelines() -> None:
    """Extend both pipelines, and what loads their models from a name; once."""
    if pipelines.load_model.__module__ == __name__:
        return
    pipelines.load_model = _loading(pipelines.load_model)
    ZeroShotImageClassificationPipeline.preprocess = _with_slots(ZeroShotImageClassificationPipeline.preprocess)
    ImageClassificationPipeline._forward = _with_logits(ImageClassificationPipeline._forward)
    ImageClassificationPipeline.postprocess = _with_names(ImageClassificationPipeline.postprocess)


def _adapter_of(model: nn.Module) -> VLMConfig | None:
    """The configuration of the active adapter of this package, however it was loaded; None for all other models.

    Args:
        model: A `PeftModel`, its base model, or a model of transformers after `load_adapter`.
    """
    configs = getattr(model, "peft_config", None)
    if isinstance(model, PeftModel):
        config = model.active_peft_config
    elif isinstance(configs, dict) and configs:
        config = next(reversed(configs.values()))
    else:
        config = None
    return config if isinstance(config, VLMConfig) else None


def _loading(original: Any) -> Any:
    """Load a model by name; what cannot classify is refused before a head of random weights is built for it."""

    @wraps(original)
    def load_model(model: Any, *args: Any, task: str | None = None, **options: Any) -> Any:
        if task == "image-classification" and isinstance(model, str):
            try:
                config = read_config(model, revision=options.get("revision"), token=options.get("token"))
            except (OSError, ValueError):  # no adapter, or none that is known here
                config = None
            if isinstance(config, VLMConfig):
                _check_stores_classes(config)
                options["model_classes"] = (AutoModel,)
        return original(model, *args, task=task, **options)

    load_model.__module__ = __name__
    return load_model


def _with_slots(original: Any) -> Any:
    """Tokenise the labels with the places that the active adapter fills, and its own template unless one is given."""

    @wraps(original)
    def preprocess(
        self: Any, image: Any, candidate_labels: Any = None, hypothesis_template: str | None = None, **options: Any
    ) -> Any:
        config = _adapter_of(self.model)
        own = config.template if config is not None and isinstance(config.template, str) else None
        template = hypothesis_template or own or TEMPLATE
        inputs = original(self, image, candidate_labels, template, **options)
        slots = slots_of(self.model) if config is not None else None
        if slots is None:
            return inputs
        ids = inputs["text_inputs"][0]["input_ids"]
        if bool((ids[:, 1:] == slots.placeholder_id).any()):  # the template names the places itself
            return inputs
        prompts = tokenize_for_model(self.model, self.tokenizer, candidate_labels, template=template)
        ids = reserve_slots(self.model, prompts).input_ids.to(ids.device)
        inputs["text_inputs"] = [BatchEncoding({"input_ids": ids})]
        return inputs

    return preprocess


def _with_logits(original: Any) -> Any:
    """Logits over the stored classes."""

    @wraps(original)
    def _forward(self: Any, model_inputs: Any) -> Any:
        config = _adapter_of(self.model)
        if config is None:
            return original(self, model_inputs)
        _check_stores_classes(config)
        return {"logits": self.model(**model_inputs).logits_per_image}

    return _forward


def _with_names(original: Any) -> Any:
    """Labels and scores by the names that the adapter records."""

    @wraps(original)
    def postprocess(self: Any, model_outputs: Any, function_to_apply: Any = None, top_k: int | None = 5) -> Any:
        config = _adapter_of(self.model)
        if config is None:
            return original(self, model_outputs, function_to_apply, top_k)
        scores = model_outputs["logits"][0].float().softmax(dim=-1)
        best = scores.topk(len(scores) if top_k is None else min(top_k, len(scores)))
        names = config.class_names or [f"LABEL_{index}" for index in range(len(scores))]
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": names[index], "score": score} for index, score in pairs]

    return postprocess


def _check_stores_classes(config: VLMConfig) -> None:
    """Refuse an adapter that classifies by class names, which `image-classification` does not take."""
    if not config.to_dict().get("num_classes"):
        raise UnsupportedModelError(
            f"Expected an adapter with stored classes (PromptKD) for 'image-classification', got one of "
            f"{config.peft_type.value!r}, which classifies by class names. Use 'zero-shot-image-classification', or "
            "`peft_vlm.PromptedClassifier`, which reads the recorded names."
        )
