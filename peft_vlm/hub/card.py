"""Model cards made from facts: every sentence comes from the adapter folder or from the record of the adapter type."""

import re
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from peft_vlm.adapters.config import VLMConfig, adapter_settings, read_config
from peft_vlm.files import (
    CARD_NAME,
    CURVE_NAME,
    FACTS_NAME,
    PROMPT_IMAGE_NAME,
    WEIGHTS_NAME,
    file_inside,
    is_of,
    last_part,
    read_text,
    write_bytes,
)
from peft_vlm.hub.adapter_folder import HUB_ID, AdapterFolder, Score
from peft_vlm.serving.escape import code_span, markdown, printable, python_string

TEMPLATE = resources.files("peft_vlm.hub").joinpath("card_template.md")
#: To be changed here and in the README when the package is on an index.
INSTALL = 'pip install "git+<URL of the peft_vlm repository>"'
SHOWN_CLASSES = 100
TWO_TOWERS = ("clip", "siglip")

CLASSIFIER_SNIPPET = """import peft_vlm

classifier = peft_vlm.PromptedClassifier.from_pretrained({adapter})
print(classifier.predict("photo.png", top_k=3))"""
MODEL_SNIPPET = """import peft_vlm  # makes PEFT know the method
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({base})
model = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(model, {adapter})"""


def render_card(
    folder: AdapterFolder,
    *,
    repo_id: str,
    license: str | None,
    base_model: str | None = None,
    subfolder: str | None = None,
    title: str | None = None,
    note: str = "",
) -> ModelCard:
    """The model card of an adapter folder.

    Args:
        folder: The adapter folder.
        repo_id: Hub id or folder that it will be loaded from.
        license: Identifier of the licence, as the Hub spells it; without one the card mentions it.
        base_model: Hub id of the base model; None for what the configuration names.
        subfolder: Folder inside the repository.
        title: Heading; by default the method and the last part of `repo_id`.
        note: Further paragraph below the heading, in Markdown.
    """
    base = _portable(base_model or folder.config.base_model_name_or_path or "an unnamed base model")
    scores = folder.evaluation.scores if folder.evaluation else ()
    task, name = pipeline_tag(folder.config), repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=license and printable(license),
        library_name="peft",
        base_model=base if HUB_ID.fullmatch(base) else None,
        base_model_relation="adapter",
        pipeline_tag=task,
        tags=_tags_of(folder, base),
        model_name=printable(name) if scores else None,
        eval_results=_index_entries(scores, task=task) if scores else None,
    )
    place = python_string(repo_id) + (f", subfolder={python_string(subfolder)}" if subfolder else "")
    is_recorded = base_model in (None, folder.config.base_model_name_or_path) and folder.config.revision
    base_place = python_string(base) + (f", revision={python_string(folder.config.revision)}" if is_recorded else "")
    snippet = CLASSIFIER_SNIPPET if _is_classifier(folder.config) else MODEL_SNIPPET
    facts = _facts(folder, base) | {
        "title": markdown(title or f"{folder.kind.title}: {name}"),
        "snippet": snippet.format(adapter=place, base=base_place),
        "note": note,
        "licence": markdown(license or "The publisher gave none: ask before use."),
    }
    return ModelCard.from_template(data, template_str=TEMPLATE.read_text("utf-8"), **facts)


def write_card(folder: Path, *, license: str | None = None, place: Path | None = None) -> None:
    """Write the card of a local adapter folder again, from what lies in it by now.

    It names no folder of this computer but the adapter's own. An adapter of PEFT's own types that this package has not
    trained keeps the card it has.

    Args:
        folder: The adapter.
        license: Identifier of its licence; None for the one of the card that is there.
        place: Where the folder will be; None: where it is.
    """
    card = file_inside(folder, CARD_NAME)
    if not isinstance(read_config(folder), VLMConfig) and not (folder / FACTS_NAME).is_file():
        return
    if license is None and card is not None:
        license = _license_of(card)
    name = (place or folder).resolve().name
    content = render_card(AdapterFolder.read(folder), repo_id=f"path/to/{name}", license=license)
    write_bytes(folder / CARD_NAME, str(content).encode())


def _license_of(card: Path) -> str | None:
    """The licence on a card; None where it names none that can be read."""
    try:
        license = ModelCard(read_text(card), ignore_metadata_errors=True).data.license
    except (ValueError, TypeError, AttributeError, RecursionError, YAMLError):
        return None
    return license if isinstance(license, str) else None


def _portable(text: str) -> str:
    """Replace the place of a file on somebody's computer by its name."""
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return f"path/to/{last_part(text)}" if is_absolute else text


def _facts(folder: AdapterFolder, base: str) -> dict[str, Any]:
    """Facts of the folder for the template."""
    about, evaluation = folder.kind, folder.evaluation
    return {
        "install": INSTALL,
        "summary": _summary(folder, base),
        "score_table": _score_table(evaluation.scores) if evaluation else "",
        "evaluation_facts": evaluation.facts if evaluation else (),
        "evaluated_others": folder.evaluated_others,
        "plots": {name: name.removesuffix(".png").replace("_", " ") for name in folder.plots},
        "curve": CURVE_NAME if (folder.path / CURVE_NAME).is_file() else "",
        "prompt_image": PROMPT_IMAGE_NAME if folder.prompt_image else "",
        "classes": _classes(folder.config),
        "data_facts": _data_facts(folder),
        "settings": [
            (code_span(name), code_span(_portable(str(value)), 120)) for name, value in _settings_of(folder).items()
        ],
        "limits": _limits(folder, base),
        "environment": _environment(folder),
        "method": f"[{about.paper.title}]({about.paper.url}), {about.paper.venue}.",
        "bibtex": about.paper.bibtex,
    }


def _score_table(scores: tuple[Score, ...]) -> str:
    """The scores as a Markdown table; beside a single baseline with the gain over it, in points."""
    baselines = list(scores[0].baselines)
    gain = len(baselines) == 1
    head = ["data", "metric", "this adapter %", *(f"{markdown(name)} %" for name in baselines)]
    head += ["gain"] if gain else []
    rows = [head, ["---"] * len(head)]
    for score in scores:
        data = f"{score.dataset}, {score.split}" if score.split else score.dataset
        values = [score.value, *(score.baselines[name] for name in baselines)]
        gains = [f"{values[0] - values[1]:+.2f}"] if gain else []
        rows.append([markdown(data), markdown(score.title), *(f"{value:.2f}" for value in values), *gains])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _index_entries(scores: tuple[Score, ...], *, task: str) -> list[EvalResult]:
    """The scores in the form of the Hub's `model-index`: those of the adapter only, which the Hub ranks models by."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", score.dataset).strip("-") or "images",
            dataset_name=printable(score.dataset),
            dataset_split=printable(score.split) or None,
            metric_type="accuracy",
            metric_name=printable(f"{score.title} %"),
            metric_value=score.value,
        )
        for score in scores
    ]


def _is_classifier(config: VLMConfig) -> bool:
    """True for an adapter on a model of two towers, which classifies by itself."""
    return (config.base_architecture or {}).get("model_type") in TWO_TOWERS


def pipeline_tag(config: VLMConfig) -> str:
    """The Hub's name of the task of the adapted model."""
    if not _is_classifier(config):
        return "image-text-to-text"
    return "image-classification" if _stores_classes(config) else "zero-shot-image-classification"


def _stores_classes(config: VLMConfig) -> bool:
    """True for an adapter that classifies with stored class vectors instead of reading class names."""
    return bool(config.to_dict().get("num_classes"))


def _tags_of(folder: AdapterFolder, base: str) -> list[str]:
    """Tags of the adapter on the Hub.

    Args:
        folder: The adapter folder.
        base: The base model.
    """
    tags = {"peft", "peft_vlm", "vision-language", folder.method.replace("_", "-")}
    tags.add(printable((folder.config.base_architecture or {}).get("model_type") or "vision"))
    tags |= {"parameter-efficient-fine-tuning"}
    tags |= {f"arxiv:{folder.kind.paper.arxiv_id}"} if folder.kind.paper.arxiv_id else set()
    return sorted(tags | ({f"base_model:adapter:{base}"} if HUB_ID.fullmatch(base) else set()))


def _settings_of(folder: AdapterFolder) -> dict[str, Any]:
    """Settings of adapter, objective and training that are not None, in this order.

    A run is as long as `max_steps` says where that is set, and `num_train_epochs` otherwise; the other is left out.

    Args:
        folder: The adapter folder.
    """
    settings = adapter_settings(folder.peft_config)
    for part in ("objective", "training"):
        settings |= {k: v for k, v in ((folder.summary or {}).get(part) or {}).items() if k not in settings}
    steps = settings.get("max_steps")
    settings.pop("num_train_epochs" if isinstance(steps, int) and steps > 0 else "max_steps", None)
    return {name: value for name, value in settings.items() if value is not None}


def _summary(folder: AdapterFolder, base: str) -> str:
    about, config = folder.kind, folder.config
    size = f"{folder.num_parameters:,} parameters, {_weights_size(folder)}"
    named = f"[{markdown(base)}](https://huggingface.co/{base})" if HUB_ID.fullmatch(base) else code_span(base)
    does = "classifies images" if _is_classifier(config) else "answers questions about images"
    return (
        f"A {about.title} adapter ({size}) for {named}, made with peft_vlm; the adapted model {does}. "
        f"This adapter holds {about.trained}."
    )


def _weights_size(folder: AdapterFolder) -> str:
    size = (folder.path / WEIGHTS_NAME).stat().st_size
    if size < 1e3:
        return f"{size} bytes"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def _classes(config: VLMConfig) -> str:
    names = config.class_names
    if not names:
        return "None recorded: the adapter is not tied to classes."
    shown = ", ".join(map(code_span, names[:SHOWN_CLASSES]))
    more = f" and {len(names) - SHOWN_CLASSES:,} more in `class_names.txt`" if len(names) > SHOWN_CLASSES else ""
    template = config.template if isinstance(config.template, str) or not config.template else config.template[0]
    prompt = f" Class prompt: {code_span(template)}." if template else ""
    return f"{len(names):,} classes: {shown}{more}.{prompt}"


def _data_facts(folder: AdapterFolder) -> list[str]:
    if folder.summary is None:
        return ["Nothing is recorded about the training, for example because the adapter was converted."]
    data, objective = folder.summary.get("data") or {}, folder.summary.get("objective") or {}
    training, evaluation = folder.summary.get("training") or {}, folder.evaluation
    facts = [f"{data['num_images']:,} training images of {data['num_classes']:,} classes."] if data else []
    if share := data.get("holdout"):
        facts.append(f"The images had no parts: {share:.0%} of each class, drawn by seed 0, were kept for the test.")
    if evaluation and evaluation.shots:
        facts.append(f"Labelled images per class: at most {evaluation.shots}.")
    if objective.get("transductive"):
        facts.append("**Transductive**: trained without labels on images of the new classes too.")
    else:
        facts.append("Inductive: only images of these classes were seen in training.")
    epochs = folder.summary.get("epochs")
    length = "" if epochs is None else f" in {epochs:.3g} epochs"
    facts.append(markdown(f"Seed {training.get('seed')}, one run; {folder.summary.get('steps')} steps{length}."))
    metrics = folder.summary.get("metrics") or {}
    shown = {name: metrics.get(name) for name in ("train_loss", "eval_accuracy")}
    return facts + [f"`{name}`: {value:.4g}." for name, value in shown.items() if is_of(value, float)]


def _limits(folder: AdapterFolder, base: str) -> list[str]:
    about, config, evaluation = folder.kind, folder.config, folder.evaluation
    limits = list(about.limits)
    if not _stores_classes(config) and _is_classifier(config) and config.class_names:
        limits.append("Other class names can be given; the scores hold for those of the evaluation only.")
    if evaluation is None:
        limits.append("It was not evaluated.")
    else:
        limits.append("One run, one test set: how results vary with seeds and data is not known from this card.")
    limits.append(f"The adapter keeps the errors and biases of {code_span(base)}.")
    written = markdown(f"format version {config.format_version}, written by {config.peft_vlm_version}.")
    if config is not folder.peft_config:
        return [*limits, f"PEFT alone loads it; classes and template are in `{FACTS_NAME}`, {written}"]
    return [*limits, f"Needs peft_vlm: {written}"]


def _environment(folder: AdapterFolder) -> str:
    versions = (folder.summary or {}).get("environment") or {"peft_vlm": folder.config.peft_vlm_version}
    return markdown(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
