"""What a user hands to the trainer: in transformers' order, completed where it can be, refused in words that help."""

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, CLIPModel, TrainingArguments

from peft_vlm import (
    CoOpConfig,
    CoOpObjective,
    PromptKDConfig,
    PromptSRCConfig,
    PromptSRCObjective,
    RPPConfig,
    SkipTuningAnswerObjective,
    SkipTuningConfig,
    SkipTuningObjective,
    TVPConfig,
    VLMTrainer,
    VLMTrainingArguments,
)
from peft_vlm.data import EvalTransform, ImageQuestionDataset, QuestionCollator, TrainTransform, load_image_dataset
from peft_vlm.errors import DataError, PeftVLMError
from peft_vlm.objective import Objective
from tests.cases import CASES, Case, base_model, class_prompts, images
from tests.tiny import clip_processor, colour_names, colour_rows
from tests.tiny_questions import QUESTION, llava_processor, tiny_llava
from tests.tiny_streams import stream, table

ASSETS = "examples/assets"


def student(config) -> torch.nn.Module:
    return get_peft_model(CLIPModel.from_pretrained(f"{ASSETS}/clip_student"), config)


def arguments(folder, **settings) -> VLMTrainingArguments:
    own = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return VLMTrainingArguments(str(folder), **(own | settings))


def rows(count: int = 12) -> Dataset:
    """A plain table of `datasets`, as the Hub has them."""
    names = list(colour_names())
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    found = [{"image": row["image"], "label": row["label"]} for row in colour_rows(3)[:count]]
    return Dataset.from_list(found, features=features)


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (CoOpConfig(num_text_tokens=2, context_init=None), CoOpObjective),
        (SkipTuningConfig(start_layer=3), SkipTuningObjective),
        (PromptSRCConfig(text_depth=2, vision_depth=2, context_init=None), PromptSRCObjective),
    ],
)
def test_the_methods_own_objective_is_built_from_the_classes(config, objective, tmp_path) -> None:
    """Four lines train an adapter; the template is recorded with it."""
    dataset = images(per_class=1)
    dataset.transform = None
    model = student(config)
    trainer = VLMTrainer(model, arguments(tmp_path), train_dataset=dataset, template="a {} square")
    assert type(trainer.objective) is objective
    assert trainer.objective.prompts.class_names == dataset.class_names
    assert isinstance(trainer.train_dataset.transform, TrainTransform)
    assert dataset.transform is None, "the user's dataset stays as it is"
    trainer.train()
    assert model.active_peft_config.template == "a {} square"
    assert model.active_peft_config.class_names == list(dataset.class_names)


def test_the_answers_of_a_multimodal_model_are_the_class_names(tmp_path) -> None:
    """Skip Tuning on a LLaVA, without an objective."""
    collator = QuestionCollator(llava_processor(), clip_processor=clip_processor(16))
    names = list(colour_names())
    data = ImageQuestionDataset(colour_rows(2), names, question=QUESTION, label_column="label", collator=collator)
    model = get_peft_model(tiny_llava(), SkipTuningConfig(start_layer=1))
    trainer = VLMTrainer(model, arguments(tmp_path), train_dataset=data)
    assert isinstance(trainer.objective, SkipTuningAnswerObjective)
    trainer.train()
    with pytest.raises(PeftVLMError, match="Expected an `ImageQuestionDataset` with a collator"):
        VLMTrainer(model, arguments(tmp_path), train_dataset=images(), processing_class=clip_processor())
    lora = get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PeftVLMError, match="an `objective` for an adapter of type 'lora'"):
        VLMTrainer(lora, arguments(tmp_path), train_dataset=data)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptKDConfig(class_dim=8, vision_depth=1), "PromptKD needs more than class names: `teacher`. Pass `obj"),
        (RPPConfig(text_depth=1, vision_depth=1, context_init=None), "RPP needs more than class names.*a teacher for"),
        (TVPConfig.for_processor(clip_processor(), border=5), "TVP needs more than class names.*TVPObjective"),
        (None, "Expected a model with an adapter, got `CLIPModel`. Call `get_peft_model"),
    ],
)
def test_what_a_method_needs_beside_class_names_is_said(config, message: str, tmp_path) -> None:
    """A teacher cannot be guessed."""
    model = CLIPModel.from_pretrained(f"{ASSETS}/clip_student") if config is None else student(config)
    with pytest.raises(PeftVLMError, match=message):
        VLMTrainer(model, arguments(tmp_path), train_dataset=images())


@pytest.mark.parametrize("kind", ["table", "splits", "set_transform"])
def test_a_plain_table_of_datasets_is_trained_on(kind: str, tmp_path) -> None:
    """As in every other trainer; pixels come from `processing_class`, or from the table's own transform."""
    processor = AutoProcessor.from_pretrained(f"{ASSETS}/clip_student")
    data = {"table": rows(), "splits": DatasetDict(train=rows(), validation=rows(6)), "set_transform": rows()}[kind]
    evaluation = data if kind == "splits" else rows(6)
    if kind == "set_transform":
        prepare = EvalTransform(processor.image_processor)
        generator = torch.Generator()
        data.set_transform(
            lambda batch: {
                "pixel_values": [prepare(image.convert("RGB"), generator) for image in batch["image"]],
                "label": batch["label"],
            }
        )
    model = student(SkipTuningConfig(start_layer=3))
    trainer = VLMTrainer(
        *(model, arguments(tmp_path, eval_strategy="steps", eval_steps=1)),
        **{"train_dataset": data, "eval_dataset": evaluation, "processing_class": processor},
    )
    assert len(trainer.train_dataset) == 12
    assert trainer.train_dataset.class_names == tuple(colour_names())
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 100
    assert trainer.predict(rows(5)).predictions.shape == (5, len(colour_names()))


def test_a_table_whose_transform_makes_no_pixels_is_refused(tmp_path) -> None:
    """Another transform would be used in its place, silently."""
    data = rows()
    data.set_transform(lambda batch: {"words": batch["label"]})
    with pytest.raises(DataError, match=r"`set_transform` that gives 'pixel_values', got \['words'\]"):
        VLMTrainer(student(SkipTuningConfig(start_layer=3)), arguments(tmp_path), train_dataset=data)


def test_usual_mistakes_are_answered_in_words(tmp_path) -> None:
    """transformers' own messages speak of attributes of what was confused."""
    model, objective, args, data = coop(), CoOpObjective(class_prompts()), arguments(tmp_path), images()
    given = {"train_dataset": data, "objective": objective}
    with pytest.raises(TypeError, match="`args` to be `VLMTrainingArguments`, got `CoOpObjective`. Call `VLMTrainer"):
        VLMTrainer(model, objective, args, train_dataset=data)
    with pytest.raises(TypeError, match="got `TrainingArguments`. Its defaults .* `from peft_vlm import"):
        VLMTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), **given)
    with pytest.raises(TypeError, match="Expected a model as the first argument, got `VLMTrainingArguments`"):
        VLMTrainer(args, model, **given)
    with pytest.raises(TypeError, match="Expected `objective` to be an `Objective`.*got the class `CoOpObjective`"):
        VLMTrainer(model, args, train_dataset=data, objective=CoOpObjective)
    with pytest.raises(TypeError, match="`train_dataset` to be images of `load_image_dataset`.*got `list`"):
        VLMTrainer(model, args, train_dataset=[1], objective=objective)
    with pytest.raises(TypeError, match="`train_dataset` to be images of `load_image_dataset`.*got `NoneType`"):
        VLMTrainer(model, args, objective=objective)
    for name in ("data_collator", "model_init", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"Expected no `{name}`, got `function`"):
            VLMTrainer(model, args, **given, **{name: test_usual_mistakes_are_answered_in_words})
    with pytest.raises(ValueError, match="Expected no `template` beside an `objective`"):
        VLMTrainer(model, args, **given, template="a {}.")


def coop() -> torch.nn.Module:
    return get_peft_model(base_model(), CoOpConfig(num_text_tokens=2, context_init=None))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_settings_that_are_no_number_are_refused(case: Case, value: float, tmp_path) -> None:
    """Every loss would be NaN, or one term all of it."""
    found = case.objective(class_prompts()).config_dict()
    model = get_peft_model(base_model(), case.config())
    for name in [name for name, setting in found.items() if isinstance(setting, float)]:
        with pytest.raises(ValueError, match=f"^Expected .*`{name}`.*{value}"):
            trainer_with(model, tmp_path, lambda name=name: case.objective(class_prompts(), **{name: value}))


def trainer_with(model: torch.nn.Module, folder, objective: Callable[[], Objective]) -> VLMTrainer:
    """A trainer with a new objective."""
    return VLMTrainer(model, arguments(folder), train_dataset=images(), objective=objective())


def test_a_model_that_is_offloaded_by_hooks_alone_is_not_trained(tmp_path) -> None:
    """torch would speak of meta tensors."""
    model = base_model()
    cpu_offload(model, torch.device("cpu"))
    model = get_peft_model(model, SkipTuningConfig(start_layer=1))
    with pytest.raises(PeftVLMError, match="got one that is offloaded by hooks alone.*Load it with `device_map`"):
        VLMTrainer(model, arguments(tmp_path), train_dataset=images(), objective=SkipTuningObjective(class_prompts()))


def test_a_methods_objective_goes_with_its_own_adapter(tmp_path) -> None:
    """A plain CLIP would be trained as a whole; a LoRA would be recorded as what it is not."""
    args, data, objective = arguments(tmp_path), images(), CoOpObjective(class_prompts())
    with pytest.raises(PeftVLMError, match="an adapter of `CoOpConfig` for `CoOpObjective`, got a model without"):
        VLMTrainer(base_model(), args, train_dataset=data, objective=objective)
    lora = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PeftVLMError, match="got one of type 'lora'"):
        VLMTrainer(lora, args, train_dataset=data, objective=objective)


def test_every_evaluation_dataset_is_checked_whenever_it_comes(tmp_path) -> None:
    """At the start, in `evaluate`, in `predict`, one or several by name."""
    few = images().restrict(range(3))
    augmented = images().with_transform(TrainTransform(clip_processor()))
    wrong = [(few, "class names of the objective's prompts"), (augmented, "without random augmentation")]
    wrong += [(stream(table()), "with an end, got a stream"), ([1], "got `list`")]
    common = {"train_dataset": images(), "objective": CoOpObjective(class_prompts())}
    trainer = VLMTrainer(coop(), arguments(tmp_path), **common)
    for dataset, message in wrong:
        for call in (
            lambda d: VLMTrainer(coop(), arguments(tmp_path), eval_dataset=d, **common),
            lambda d: VLMTrainer(coop(), arguments(tmp_path), eval_dataset={"a": images(), "b": d}, **common),
            trainer.evaluate,
            lambda d: trainer.evaluate({"a": d}),
            trainer.predict,
        ):
            with pytest.raises((DataError, TypeError), match=message):
                call(dataset)
    trainer.eval_dataset = few
    with pytest.raises(DataError, match="class names of the objective's prompts"):
        trainer.evaluate()


def test_several_datasets_by_name_are_evaluated(tmp_path) -> None:
    """It ended in an error about a dictionary."""
    several = {"one": images(per_class=1, seed=9), "two": images(per_class=2, seed=5)}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    common = {"train_dataset": images(), "objective": CoOpObjective(class_prompts())}
    trainer = VLMTrainer(coop(), args, eval_dataset=several, **common)
    trainer.train()
    logged = set().union(*(entry.keys() for entry in trainer.state.log_history))
    assert {"eval_one_accuracy", "eval_two_accuracy"} <= logged
    found = trainer.evaluate()
    for name, dataset in several.items():
        alone = trainer.evaluate(dataset)
        assert alone["eval_loss"] == found[f"eval_{name}_loss"]
        assert alone["eval_accuracy"] == found[f"eval_{name}_accuracy"]


def test_images_without_labels_are_predicted(tmp_path) -> None:
    """`predict` needs no labels; it has then no metrics."""
    labelled = images(per_class=1, seed=9)
    bare = load_image_dataset(rows(6), transform=labelled.transform)
    bare.labels = [-1] * len(bare)
    common = {"train_dataset": images(), "objective": CoOpObjective(class_prompts())}
    trainer = VLMTrainer(coop(), arguments(tmp_path), **common)
    result = trainer.predict(bare)
    assert result.predictions.shape[0] == 6
    assert "test_accuracy" not in result.metrics
    with pytest.raises(DataError, match="with labels, got images without"):
        trainer.evaluate(bare)
