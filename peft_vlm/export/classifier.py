"""An image classifier in plain torch from an adapter, and its files: safetensors, torch.export, ONNX."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import BaseImageProcessor

from peft_vlm.adapters.config import VLMConfig, installed_version
from peft_vlm.data.transforms import image_size_of, mean_and_std_of
from peft_vlm.errors import AdapterError, ClassNameError, DataError, PeftVLMError, check_list
from peft_vlm.evaluation.classify import cosine_logits
from peft_vlm.evaluation.run import load_model
from peft_vlm.export.tower import copy_tower
from peft_vlm.files import write_json
from peft_vlm.models.towers import towers_of, unwrap
from peft_vlm.serving.card import METADATA_KEY, ClassifierCard
from peft_vlm.serving.images import Preprocessing
from peft_vlm.serving.plain import PlainClassifier
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import tokenize_for_model

#: Largest difference of a logit that an export may show against its model, in float32.
TOLERANCE = 1e-3


def export_classifier(
    adapter: str | Path | None,
    *,
    base_model: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    template: str | Sequence[str] | None = None,
    revision: str | None = None,
) -> PlainClassifier:
    """Make an image classifier with fixed classes, without PEFT and text encoder, from an adapter or a base model.

    Args:
        adapter: Folder or Hub id; None for the base model alone.
        base_model: Folder or id of the base model; None for the one the adapter records.
        class_names: Used instead of the classes the adapter records.
        template: Used instead of the template the adapter records.
        revision: Branch, tag or commit of the adapter on the Hub.

    Raises:
        ClassNameError: If there are no class names.
    """
    check_list("class_names", class_names)
    loaded = load_model(adapter, base_model=base_model, device="cpu", revision=revision)
    names = loaded.class_names if class_names is None else tuple(class_names)
    if names is None:
        raise ClassNameError("Neither the adapter nor the call names classes. Pass `class_names=`.")
    chosen = template or loaded.template or "a photo of a {}."
    model = loaded.model
    prompts = tokenize_for_model(model, loaded.tokenizer, names, template=chosen)
    source = {
        "adapter": None if adapter is None else str(adapter),
        "base_model": loaded.base_model,
        "template": chosen,
        "peft_vlm_version": installed_version(),
    }
    if isinstance(model, PeftModel):
        source["method"] = model.active_peft_config.peft_type.value.lower()
        if not isinstance(model.active_peft_config, VLMConfig):  # PEFT's own layers have no plain form but merged
            model = model.merge_and_unload(safe_merge=True)
    vectors = encode_classes(model, prompts)
    options = {"image_processor": loaded.image_processor, "source": source, "value_range": loaded.value_range}
    return plain_classifier(model, vectors, names, **options)


def plain_classifier(
    model: nn.Module,
    class_features: Float[Tensor, "*samples classes dim"],
    class_names: Sequence[str],
    *,
    image_processor: BaseImageProcessor,
    source: dict[str, Any] | None = None,
    value_range: tuple[float, float] | None = None,
) -> PlainClassifier:
    """Make an image classifier from a model in memory with its active adapter, and compare their logits.

    Args:
        model: `CLIPModel`, `SiglipModel` or a `PeftModel` around one, on any device; it is not changed.
        class_features: Result of `encode_classes` for it.
        class_names: One per row.
        image_processor: Image processor of the model.
        source: Origin of the model, for the card.
        value_range: Black and white of images with more than 8 bits; None: those of their type.

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        AdapterError: If there are several sets of class features, whose probabilities are averaged.
        PeftVLMError: If its logits differ from those of the model.
    """
    check_list("class_names", class_names)
    if class_features.ndim > 2:
        raise AdapterError(
            f"Expected one set of class features, got {len(class_features)}, whose probabilities the adapter averages "
            "(Bayesian prompts). A plain classifier holds one: use `PromptedClassifier`."
        )
    shape, tower = copy_tower(model)
    card = ClassifierCard(
        tuple(class_names),
        preprocessing_of(image_processor, value_range),
        {**shape, "dim": class_features.shape[-1]},
        source or {},
    )
    with torch.device("meta"):  # every tensor is replaced
        classifier = PlainClassifier(card)
    towers = towers_of(model)
    classifier.tower, classifier.class_vectors = tower, class_features.detach().clone()
    classifier.scale, classifier.bias = torch.tensor(towers.logit_scale), torch.tensor(towers.logit_bias)
    classifier = classifier.cpu().eval()
    pixels = torch.randn(2, 3, *shape["image_size"], generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(classifier.tower.positions.dtype)
    with torch.inference_mode():
        expected = cosine_logits(model, class_features)(pixels.to(unwrap(model).device)).cpu()
        difference = float((classifier(pixels) - expected).abs().max())
    limit = TOLERANCE if pixels.dtype == torch.float32 else 1.0
    if not difference <= limit:
        raise PeftVLMError(
            f"The exported classifier differs from `{type(towers.model).__name__}` by {difference:.2g} in a logit, "
            f"expected at most {limit}. Something in the image tower is changed that an export does not see, such as "
            "a hook or a module of your own; please report it if there is none."
        )
    return classifier


def preprocessing_of(processor: BaseImageProcessor, value_range: tuple[float, float] | None = None) -> Preprocessing:
    """The steps of an image processor as data.

    Args:
        processor: Image processor of a CLIP-like model.
        value_range: Black and white of images with more than 8 bits.

    Raises:
        DataError: If it does something that the data cannot say.
    """
    settings, size = processor.to_dict(), image_size_of(processor)
    wanted = settings["size"]
    resize = (wanted["shortest_edge"],) if wanted.get("shortest_edge") else (wanted.get("height"), wanted.get("width"))
    if not settings["do_resize"] or None in resize or wanted.get("longest_edge") or min(resize) < min(size):
        raise DataError(
            f"Expected an image processor that resizes to a height and width, or by the shorter side, to at least "
            f"{size}, got `{type(processor).__name__}` with size {wanted!r} and do_resize={settings['do_resize']!r}."
        )
    mean, std = mean_and_std_of(processor)
    factor = float(settings["rescale_factor"]) if settings["do_rescale"] else 1.0
    return Preprocessing(size, tuple(resize), int(settings["resample"]), factor, mean, std, value_range)


CARD_NAME = "classifier.json"


def _export_program(classifier: PlainClassifier) -> torch.export.ExportedProgram:
    """The classifier as a torch program for batches of any size, without Python code of ours.

    Args:
        classifier: Result of `export_classifier`.
    """
    shape = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(classifier, (_example(classifier),), dynamic_shapes=shape)


def save_program(classifier: PlainClassifier, path: Path) -> None:
    """Write the torch program; `torch.export.load(path).module()` runs it.

    Args:
        classifier: Result of `export_classifier`.
        path: File that ends in `.pt2`.
    """
    torch.export.save(_export_program(classifier), path, extra_files={METADATA_KEY: classifier.card.to_json()})


def save_onnx(classifier: PlainClassifier, path: Path) -> None:
    """Write an ONNX file with input `pixel_values`, output `logits` and the card as metadata.

    Args:
        classifier: Result of `export_classifier`.
        path: File to write.

    Raises:
        PeftVLMError: If the extra `onnx` is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise PeftVLMError(
            f"Writing ONNX needs {' and '.join(missing)}. Install: pip install onnx onnxscript onnxruntime."
        )
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    with _quiet():
        program = torch.onnx.export(_export_program(classifier), dynamo=True, verbose=False, **names)
    assert program is not None, "the dynamo exporter gives a program"
    program.model.metadata_props[METADATA_KEY] = classifier.card.to_json()
    program.save(str(path), external_data=False)


FORMATS: dict[str, tuple[str, Callable[[PlainClassifier, Path], None]]] = {
    "safetensors": ("classifier.safetensors", PlainClassifier.save),
    "onnx": ("classifier.onnx", save_onnx),
    "pt2": ("classifier.pt2", save_program),
}
"""File name and writer by the word of the command line."""


def write_export(classifier: PlainClassifier, folder: str | Path, formats: Sequence[str]) -> list[Path]:
    """Write a classifier in several formats, and `classifier.json` with its card.

    Args:
        classifier: Result of `export_classifier`.
        folder: Made where it does not exist.
        formats: Keys of `FORMATS`.

    Returns:
        The files.

    Raises:
        PeftVLMError: If a format is unknown.
    """
    check_list("formats", formats)
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise PeftVLMError(f"Expected formats of {sorted(FORMATS)!r}, got {list(formats)!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in formats:
        file_name, write = FORMATS[name]
        write(classifier, folder / file_name)
        files.append(folder / file_name)
    write_json(folder / CARD_NAME, asdict(classifier.card))
    return [*files, folder / CARD_NAME]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter of torch 2.13 about missing torchvision and its own deprecated calls."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _example(classifier: PlainClassifier) -> torch.Tensor:
    """Two images: a dimension of one would be taken for a constant."""
    return torch.zeros(2, 3, *classifier.card.architecture["image_size"], dtype=classifier.tower.positions.dtype)
