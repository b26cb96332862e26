"""One training from named settings (`name=value`): model, data, adapter, objective, trainer, report."""

import difflib
import inspect
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from peft_vlm.adapters.config import OFFICIAL_LAYERS, VLMConfig, architecture_of
from peft_vlm.data.benchmarks import load_benchmark, template_for
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.folders import split_of
from peft_vlm.data.images import as_value_range
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.data.splits import base_and_new_classes, check_not_trained_on, few_shot, image_sample, is_chosen_on
from peft_vlm.data.transforms import EvalTransform, ImageTransform, RandomCrop, TrainTransform, mean_and_std_of
from peft_vlm.distributed import shows_progress
from peft_vlm.errors import HubError, PeftVLMError, PeftVLMWarning, check_choice, check_list, shown
from peft_vlm.evaluation.mllm import likelihood_accuracy
from peft_vlm.evaluation.plots import has_matplotlib
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import check_path, load_model, run_evaluation
from peft_vlm.experiments.transfer import ImageTextModel
from peft_vlm.files import BASELINE_NAME, is_of
from peft_vlm.hub.card import write_card
from peft_vlm.models.repository import hub_options, is_local, why_cache_only
from peft_vlm.models.towers import FAMILIES
from peft_vlm.objective import Objective
from peft_vlm.registry import METHODS, Preset, RunSize
from peft_vlm.settings import OFFICIAL, RUN_PROTOCOLS, EvaluationArguments, RunSettings
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import check_same_vocabulary, tokenize_for_model
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.callbacks import OneBar
from peft_vlm.training.trainer import VLMTrainer


def named_values(words: Sequence[str], name: str) -> dict[str, Any]:
    """`["depth=3", "init=a photo"]` as `{"depth": 3, "init": "a photo"}`: values are JSON, else text.

    Args:
        words: Words of the command line.
        name: Flag that they belong to.

    Raises:
        PeftVLMError: If a word has no `=`.
    """
    check_list("words", words)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise PeftVLMError(f"Expected `{name}` as name=value, got {word!r}.")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def _accepted(target: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an offer that a function or class has a parameter for.

    Args:
        target: Function or class.
        offered: Values by name.
    """
    parameters = inspect.signature(target).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def build(
    target: Callable[..., Any], settings: dict[str, Any], *given: Any, name: str, hidden: type | None = None
) -> Any:
    """Call with named settings; unknown and missing ones are errors that list what there is.

    Args:
        target: Function or class.
        settings: Keyword arguments.
        *given: Positional arguments.
        name: Flag that the settings come from, for the messages.
        hidden: Class whose parameters are not listed, such as a base class.

    Raises:
        PeftVLMError: If a setting is unknown or missing.
    """
    parameters = list(inspect.signature(target).parameters.values())[len(given) :]
    unknown = sorted(set(settings) - {p.name for p in parameters})
    if unknown:
        shared = inspect.signature(hidden).parameters if hidden else {}
        own = ", ".join(p.name for p in parameters if p.name not in shared)
        raise PeftVLMError(f"`{name}` has no setting {', '.join(unknown)}. It has: {own}.")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in settings]
    if missing:
        raise PeftVLMError(f"The method needs {', '.join(missing)}: pass `--{missing[0]}`, or set it in `{name}`.")
    try:
        return target(*given, **settings)
    except TypeError as error:  # a value of another kind, which was written on the command line
        raise PeftVLMError(f"`{name}`: {error}") from error


#: Settings that are handed on to `load_image_dataset`.
DATA_SETTINGS = ("image_column", "label_column", "class_names", "value_range", "data_root")


@dataclass
class _Parts:
    """Parts of a run, and the function that measures its result."""

    model: nn.Module
    objective: Objective
    train: ImageClassificationDataset
    eval: ImageClassificationDataset | None
    evaluate: Callable[[], dict[str, float]]


def preset_of(settings: RunSettings, size: RunSize) -> Preset:
    """The official configuration that the settings name; what the method recommends where they name none.

    Args:
        settings: Settings of the run.
        size: Size of the run.

    Raises:
        PeftVLMError: If the method has no presets.
        ValueError: If it has no preset of this name.
    """
    method = METHODS[settings.method]
    if settings.preset is None:
        return Preset() if method.recommended is None else method.recommended(size)
    if method.preset_for is None:
        raise PeftVLMError(f"{settings.method!r} has no presets. Leave out `preset`.")
    check_choice("preset", settings.preset, method.presets)
    return method.preset_for(settings.preset, **_accepted(method.preset_for, {"shots": settings.shots or size.fewest}))


def _size_of(settings: RunSettings, images: ImageClassificationDataset, model_config: dict[str, Any]) -> RunSize:
    """What recommended settings depend on.

    Args:
        settings: Settings of the run.
        images: The part of the dataset to train on, all classes.
        model_config: `to_dict()` of the base model's configuration.
    """
    count = Counter(images.labels)
    classes = range(len(images.class_names)) if settings.transductive else _labelled(images, settings)
    shown = [count[label] for label in classes if count[label]]
    shots = 0 if settings.transductive else settings.shots
    numbers = [min(shots, number) if shots else number for number in shown] or [1]
    layers = architecture_of(model_config).get("vision_num_hidden_layers")
    return RunSize(
        protocol=settings.protocol,
        num_images=sum(numbers),
        num_classes=len(numbers),
        fewest=min(numbers),
        is_small=layers is not None and layers < OFFICIAL_LAYERS,
    )


@dataclass(frozen=True)
class RunPlan:
    """Settings of a run with everything that the data, the size of the model and the method fill in.

    Args:
        settings: Settings, with a template.
        model_config: Configuration of the base model.
        pool: The part of the dataset to train on, all classes.
        size: What recommended settings depend on.
        preset: Official or recommended settings.
        args: Training arguments.
        config: Settings of the adapter.
        objective: Settings of the objective.
    """

    settings: RunSettings
    model_config: PretrainedConfig
    pool: ImageClassificationDataset
    size: RunSize
    preset: Preset
    args: VLMTrainingArguments
    config: dict[str, Any]
    objective: dict[str, Any]

    @property
    def is_clip_like(self) -> bool:
        """Whether the base model has two towers, and writes no text."""
        return isinstance(self.model_config, tuple(family.config_class for family in FAMILIES))


def plan_of(settings: RunSettings, arguments: Callable[[dict[str, Any]], VLMTrainingArguments]) -> RunPlan:
    """Check the names of a run and fill in what is not said; no weights are read.

    Args:
        settings: See `run_training`.
        arguments: See `run_training`.
    """
    settings.check()
    _check_names(settings)
    _check_new_classes(settings)
    if settings.template is None:
        settings = replace(settings, template=template_for(settings.dataset, settings.data_root))
    model_config = _base_config(settings.model)
    pool = images_of(settings, settings.split)
    size = _size_of(settings, pool, model_config.to_dict())
    preset = preset_of(settings, size)
    args = arguments(preset.training)
    given = named_values(settings.config, "config")
    config = {**METHODS[settings.method].defaults, **preset.config, **given}
    if config.get("class_specific"):
        config |= _for_fixed_classes(settings, given)
    options = preset.objective | named_values(settings.objective, "objective")
    return RunPlan(settings, model_config, pool, size, preset, args, config, options)


def run_training(
    settings: RunSettings,
    arguments: Callable[[dict[str, Any]], VLMTrainingArguments],
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train an adapter, save it in `output_dir` of its arguments, and measure it.

    Args:
        settings: Model, data, method and their settings.
        arguments: Makes the training arguments out of settings of the preset, or recommended ones, which it may
            override.
        callbacks: Further callbacks of the trainer.

    Returns:
        Accuracies in percent on the test split by name, those of the base model with `zero_shot_`; empty without
        `settings.evaluate`.

    Raises:
        PeftVLMError: If settings contradict each other or name what the method does not have.
    """
    plan = plan_of(settings, arguments)
    settings, args = plan.settings, plan.args
    # A missing split is better found before the training.
    test = images_of(settings, settings.test_split) if settings.evaluate else None
    if settings.preset is None and args.process_index == 0:
        _say_recommended(plan)
    set_seed(args.seed)  # a new adapter may start from random values
    parts = _classifier(plan) if plan.is_clip_like else _answerer(plan)
    if test is not None:
        same = settings.transductive and settings.split == settings.test_split  # without labels, and reported
        check_not_trained_on(test, image_sample(parts.train), num_train=len(parts.train), refuse=not same)
        _warn_of_selection(settings, args, parts.eval, test)
    trainer = VLMTrainer(
        parts.model, args, train_dataset=parts.train, eval_dataset=parts.eval, objective=parts.objective
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    bar: OneBar | None = None
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(bar := OneBar())
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:
        if bar is not None and bar.training_bar is not None:  # or it would be drawn below the message of an error
            bar.training_bar.close()
    is_main = args.process_index == 0
    # A model that writes text is measured as it is, and one with divided layers runs on all processes together.
    takes_part = is_main or (args.has_sharded_layers and not plan.is_clip_like)
    scores = parts.evaluate() if settings.evaluate and takes_part else {}
    return scores if is_main else {}


def _check_new_classes(settings: RunSettings) -> None:
    """Refuse an evaluation on new classes that the trained adapter would not know."""
    knows_all = settings.transductive or not METHODS[settings.method].adapter_type.stores_classes
    if settings.protocol == "base_to_new" and settings.evaluate and not knows_all:
        raise PeftVLMError(
            f"Expected `transductive` with `protocol=base_to_new`, got a run of {settings.method!r} without it: its "
            "adapter stores a vector per class and knows no new ones. Pass `transductive`, which trains on unlabelled "
            "images of all classes as the paper does, or `no_evaluate`, and add the new classes with `add_classes`."
        )


def _for_fixed_classes(settings: RunSettings, given: dict[str, Any]) -> dict[str, Any]:
    """What an adapter with a context per class needs beside its settings.

    Args:
        settings: Settings of the run.
        given: Settings of the adapter that were named; words to start from are not taken from a recommendation.

    Raises:
        PeftVLMError: If the run tests new classes.
    """
    if settings.protocol == "base_to_new":
        raise PeftVLMError(
            "Expected `protocol=few_shot` with `class_specific=true`, got 'base_to_new': contexts per class have "
            "nothing to say about new classes. Leave one of them out."
        )
    return {"template": settings.template} | ({} if settings.preset else {"context_init": given.get("context_init")})


def _warn_of_selection(
    settings: RunSettings, args: VLMTrainingArguments, validation: Any, test: ImageClassificationDataset
) -> None:
    """Warn, before the training, that the best checkpoint will be chosen by the images that measure it."""
    if not args.load_best_model_at_end or validation is None:
        return
    is_image_set = isinstance(validation, ImageClassificationDataset)
    if settings.eval_split == settings.test_split or (is_image_set and is_chosen_on(test, image_sample(validation))):
        warnings.warn(
            f"The checkpoint is chosen on the test images: `eval_split`={settings.eval_split!r} with "
            "`load_best_model_at_end`. Its accuracy on them will be higher than on new images, and report and card "
            "say so. Choose it on a part of the training images.",
            PeftVLMWarning,
            stacklevel=3,
        )


def _base_config(model: str) -> PretrainedConfig:
    """The configuration of a folder or id of a model."""
    check_path(model, what="base model", advice="Pass a folder, or the id of a model on the Hub, as `model`.")
    options = hub_options(model)
    try:
        return AutoConfig.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        if options["local_files_only"] and not is_local(model):
            raise HubError(
                f"The base model {model!r} is no folder here and cannot be read: {why_cache_only()}."
            ) from error
        raise PeftVLMError(f"The base model {model!r} could not be loaded: {error}") from error


def _check_names(settings: RunSettings) -> None:
    """Refuse settings that nothing has before anything is loaded."""
    check_choice("method", settings.method, sorted(METHODS))
    method = METHODS[settings.method]
    config = method.adapter_type.config
    objectives = [target for target in (method.objective, method.answer_objective) if target is not None]
    _check_known("config", settings.config, [config], hidden=_shared(config))
    _check_known("objective", settings.objective, objectives, hidden=None)
    _check_known("augmentation", settings.augmentation, [TrainTransform, RandomCrop], hidden=None)


def _check_known(
    name: str, words: Sequence[str], targets: Sequence[Callable[..., Any]], *, hidden: type | None
) -> None:
    """Refuse names that none of some functions takes, and values of other types; configurations check theirs."""
    values, parameters = named_values(words, name), [inspect.signature(target).parameters for target in targets]
    known = [known for some in parameters for known in some]
    unknown = sorted(set(values) - set(known))
    if unknown:
        shared = inspect.signature(hidden).parameters if hidden else {}
        own = [one for one in dict.fromkeys(known) if one not in {*shared, "prompts", "candidates", "image_processor"}]
        close = difflib.get_close_matches(unknown[0], own, n=1)
        advice = f" Did you mean {close[0]}?" if close else ""
        raise PeftVLMError(f"`{name}` has no setting {', '.join(unknown)}.{advice} It has: {', '.join(own)}.")
    for setting, value in values.items() if name != "config" else ():
        kinds = [some[setting].annotation for some in parameters if setting in some]
        if not any(is_of(value, kind) for kind in kinds):
            kind = re.sub(r"\b\w+\.", "", inspect.formatannotation(kinds[0]))
            raise PeftVLMError(f"Expected `{setting}` of `--{name}` to be of type {kind}, got {shown(value)}.")


def _shared(config: type) -> type:
    """The class whose fields all configurations like this one have."""
    return VLMConfig if issubclass(config, VLMConfig) else PeftConfig


def _say_recommended(plan: RunPlan) -> None:
    """Print the recommended settings that the run uses; those that were given are not among them."""
    preset, args, other = plan.preset, plan.args, plan.config | plan.objective
    used = {name: other[name] for name in (*preset.config, *preset.objective) if name in other}
    used = {name: value for name, value in used.items() if (preset.config | preset.objective)[name] == value}
    used |= {name: value for name, value in preset.training.items() if getattr(args, name) == value}
    if args.max_steps > 0 and "max_steps" not in preset.training:
        used.pop("num_train_epochs", None)
    shown = ", ".join(f"{name}={value}" for name, value in used.items() if value is not None)
    kind = "a small model" if plan.size.is_small else "models as large as ViT-B/16"
    if shown and shows_progress():
        method = plan.settings.method
        print(f"Recommended for {method} on {kind}, where no flag says otherwise: {shown}", file=sys.stderr)


def _classifier(plan: RunPlan) -> _Parts:
    """A run on a CLIP-like model."""
    if plan.settings.device_map is not None:
        raise PeftVLMError("Models with two towers fit on one GPU and take no `device_map`. Leave it out.")
    settings, args, pool = plan.settings, plan.args, plan.pool
    loaded = load_model(base_model=settings.model, device="cpu")
    augmentation = TrainTransform(loaded.image_processor, **named_values(settings.augmentation, "augmentation"))
    pool.transform, pool.seed = augmentation, args.seed
    train = pool if settings.transductive else _shots(pool, settings, args.seed)
    prompts = tokenize_for_model(loaded.model, loaded.tokenizer, train.class_names, template=settings.template)
    offered: dict[str, Any] = {"seed": args.seed, "transductive": settings.transductive}
    if plan.config.get("class_specific"):
        offered["class_names"] = list(train.class_names)
    offered["seen_classes"] = [pool.class_names[c] for c in _labelled(pool, settings)]
    if settings.anchors:
        texts = _anchor_texts(settings)
        anchors = tokenize_for_model(loaded.model, loaded.tokenizer, train.class_names, template=texts)
        offered |= dict.fromkeys(_ANCHORS, anchors)
    if settings.teacher or settings.teacher_adapter:
        teacher = load_model(settings.teacher_adapter, base_model=settings.teacher, device="cpu")
        check_same_vocabulary(loaded.tokenizer, teacher.tokenizer)
        one = tokenize_for_model(teacher.model, teacher.tokenizer, ["a"], template=settings.template)
        offered |= {"teacher": teacher.model, "class_dim": encode_classes(teacher.model, one).shape[-1]}
    objective = _objective(METHODS[settings.method].objective, plan, prompts, offered)
    model = new_adapter(loaded.model, settings.method, loaded.image_processor, plan.config, offered)
    validation = None
    if settings.eval_split is not None:
        images = _validation(settings, settings.eval_split, args.seed)
        images.transform = EvalTransform(loaded.image_processor)
        classes = set(_labelled(images, settings))  # labels of new classes choose no checkpoint
        seen = images.select([place for place, label in enumerate(images.labels) if label in classes])
        validation = seen if settings.transductive else images.restrict(sorted(classes))
    return _Parts(model, objective, train, validation, lambda: _report(settings, args))


#: What objectives call the prompts of features that are kept to.
_ANCHORS = ("frozen_prompts", "anchor_prompts")


def _anchor_texts(settings: RunSettings) -> Sequence[str]:
    """Texts around class names that the method keeps to."""
    method = METHODS[settings.method]
    if method.objective is None or not set(_ANCHORS) & set(inspect.signature(method.objective).parameters):
        raise PeftVLMError(f"{settings.method!r} has no use for `anchors`. Leave it out.")
    if settings.anchors != [OFFICIAL]:
        return settings.anchors
    if not method.anchor_templates:
        raise PeftVLMError(f"The code of {settings.method!r} has no `anchors` of its own. Name them.")
    return method.anchor_templates


def _answerer(plan: RunPlan) -> _Parts:
    """A run on a model that writes text: the classes are answers to one question."""
    settings, seed = plan.settings, plan.args.seed
    guide = METHODS[settings.method].guide
    if settings.protocol != "few_shot" or settings.transductive or (settings.teacher and guide is None):
        raise PeftVLMError("Models that write text are trained with `protocol=few_shot`, without `teacher`.")
    clip = None if settings.teacher is None else load_model(base_model=settings.teacher, device="cpu")
    places = {} if settings.device_map is None else {"device_map": settings.device_map}
    member = ImageTextModel.load(settings.model, clip_processor=clip and clip.image_processor, **places)
    crop = RandomCrop(**named_values(settings.augmentation, "augmentation")) if settings.augmentation else None

    def questions(images: ImageClassificationDataset, augmentation: RandomCrop | None = None) -> ImageQuestionDataset:
        asked = ImageQuestionDataset.from_images(images, question=settings.question, augmentation=augmentation)
        return asked.with_collator(member.collator)

    train = questions(_shots(plan.pool, settings, seed), crop)
    offered: dict[str, Any] = {}
    if clip is not None and guide is not None:
        template = METHODS[settings.method].guide_template
        prompts = tokenize_for_model(clip.model, clip.tokenizer, train.class_names, template=template)
        offered["tse_clip"] = guide(clip.model, prompts, processor=clip.image_processor)
        train = train.with_collator(member.training_collator)
    # with the end of an answer: one class name may be the beginning of another
    candidates = member.collator.candidates(train.class_names, include_end=True)
    objective = _objective(METHODS[settings.method].answer_objective, plan, candidates, offered)
    model = new_adapter(member.model, settings.method, member.collator.processor.image_processor, plan.config, {})

    def evaluate() -> dict[str, float]:
        test = questions(images_of(settings, settings.test_split))
        return {"accuracy": likelihood_accuracy(model.eval(), test, include_end=True)}

    validation = None
    if settings.eval_split is not None:
        validation = questions(_validation(settings, settings.eval_split, seed))
    return _Parts(model, objective, train, validation, evaluate)


def images_of(
    settings: RunSettings, split: str, transform: ImageTransform | None = None
) -> ImageClassificationDataset:
    """One part of a run's dataset, all classes.

    Args:
        settings: Settings of the run.
        split: Part.
        transform: Makes the pixels.
    """
    options = {name: getattr(settings, name) for name in DATA_SETTINGS}
    options |= {"config_name": settings.dataset_config, "revision": settings.dataset_revision}
    # without a test every image trains
    options["holdout"] = settings.holdout if settings.evaluate or settings.eval_split is not None else 0.0
    return load_image_dataset(settings.dataset, split=split, transform=transform, **options)


def _validation(settings: RunSettings, split: str, seed: int) -> ImageClassificationDataset:
    """Images of the validation during training; of a benchmark as few per class as CoOp's code draws."""
    if settings.data_root is None or not settings.shots or split_of(split) != "validation":
        return images_of(settings, split)
    drawn = load_benchmark(settings.dataset, settings.data_root, split="val", shots=settings.shots, seed=seed)
    drawn.value_range = as_value_range(settings.value_range)
    return drawn


def _labelled(images: ImageClassificationDataset, settings: RunSettings) -> Sequence[int]:
    """Classes whose labels may be used."""
    count = len(images.class_names)
    return base_and_new_classes(count)[0] if settings.protocol == "base_to_new" else range(count)


def _shots(pool: ImageClassificationDataset, settings: RunSettings, seed: int) -> ImageClassificationDataset:
    """The labelled images of a run."""
    chosen = few_shot(pool, shots=settings.shots, seed=seed) if settings.shots else pool
    return chosen.restrict(_labelled(pool, settings)) if settings.protocol == "base_to_new" else chosen


def new_adapter(
    base: nn.Module, method: str, image_processor: Any, config: dict[str, Any], offered: dict[str, Any]
) -> PeftModel:
    """The model with a new adapter.

    Args:
        base: Base model.
        method: Name of the method.
        image_processor: Of the base model; None where no image is read.
        config: Settings of the adapter.
        offered: Facts of the run, for configurations that have a field for them.
    """
    mean, std = ((0.0,) * 3, (1.0,) * 3) if image_processor is None else mean_and_std_of(image_processor)
    target = METHODS[method].adapter_type.config
    known = _accepted(target, {"image_mean": list(mean), "image_std": list(std), **offered})
    return get_peft_model(base, build(target, known | config, name="config", hidden=_shared(target)))


def _objective(target: Callable[..., Any] | None, plan: RunPlan, classes: Any, offered: dict[str, Any]) -> Objective:
    """The method's objective with what the run offers and the settings name."""
    settings = plan.settings
    if target is None:
        raise PeftVLMError(
            f"{settings.method!r} is not trained on models like {settings.model!r}: see docs/families.md."
        )
    for name in ("teacher", "transductive"):
        if offered.get(name) and name not in inspect.signature(target).parameters:
            raise PeftVLMError(f"{settings.method!r} has no use for `{name}`. Leave it out.")
    named = named_values(settings.objective, "objective")
    wanted = _accepted(target, plan.objective) | named  # what is recommended for CLIPs need not exist for other models
    return build(target, _accepted(target, offered) | wanted, classes, name="objective")


def _report(settings: RunSettings, args: VLMTrainingArguments) -> dict[str, float]:
    """Evaluate the saved adapter and the base model alone; the adapter's folder gets both reports."""
    same = (*DATA_SETTINGS, "model", "dataset_config", "dataset_revision", "holdout")
    evaluation = EvaluationArguments(
        **{name: getattr(settings, name) for name in same},
        protocol=RUN_PROTOCOLS[settings.protocol],
        dataset=[settings.dataset],
        output_dir=args.output_dir,
        adapter=args.output_dir,
        split=[settings.test_split],
        shots=settings.shots or None,
        seed=args.seed,
        device=str(args.device),
        plots=has_matplotlib(),
        baseline=True,
    )
    scores = run_evaluation(evaluation).scores
    write_card(Path(args.output_dir), license=args.hub_license)
    baseline = EvalReport.load(Path(args.output_dir) / BASELINE_NAME).scores
    return {**scores, **{f"zero_shot_{name}": score for name, score in baseline.items()}}
