"""PromptKD against the official code: teacher, projector, loss, gradients, BatchNorm statistics, training traces."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import PromptKDConfig, PromptKDObjective, PromptSRCConfig, VLMTrainer, VLMTrainingArguments
from peft_vlm.evaluation.classify import TextClassifier
from peft_vlm.methods.promptkd import preset_for
from peft_vlm.models.towers import image_features
from peft_vlm.objective import EpochBatchSampler
from peft_vlm.text.prompts import tokenize_for_model
from peft_vlm.training.schedule import epoch_cosine
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    load_prompts,
    prompt_tensors,
    recorded_clip,
    recorded_tokenizer,
    stacked,
    tensors,
)

PROJECTOR = {"conv1": "linear1", "bn": "norm1", "conv2": "linear2"}
STEPS = ["D2_promptkd_5steps", "D3_promptkd_5steps_decay"]
NORMALISE = torch.nn.functional.normalize


def recorded_teacher(recorded):
    """The large CLIP with its own recorded prompts in both towers."""
    tokenizer = recorded_tokenizer()
    words = tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    config = PromptSRCConfig(text_depth=3, vision_depth=3, context_init_ids=words)
    teacher = get_peft_model(recorded_clip("weights_teacher"), config)
    load_prompts(teacher, recorded, prefix="promptsrc_", group="in.teacher")
    return teacher


def setup(name: str, **settings):
    """Record, student, prepared objective and dataset."""
    case, recorded = facts(name), tensors(name)
    torch.manual_seed(0)
    student = get_peft_model(recorded_clip("weights_student"), PromptKDConfig(class_dim=96, vision_depth=3))
    load_prompts(student, recorded, prefix="promptkd_")
    with torch.no_grad():
        for official, tensor in projector_tensors(student).items():
            tensor.copy_(recorded[f"in.proj.{official}"].reshape(tensor.shape))
    teacher = recorded_teacher(recorded)
    prompts = tokenize_for_model(teacher, recorded_tokenizer(), case["classnames"], template="a photo of a {}.")
    weight = {"weight": case["kd_weight"], "temperature": case["temperature"], "reduction": "official"}
    objective = PromptKDObjective(prompts, teacher=teacher, **(weight | settings))
    pixels = recorded["in.images"].flatten(0, -4)
    dataset = RecordedImages(pixels, torch.zeros(len(pixels), dtype=torch.long), prompts.class_names)
    objective.prepare(student, dataset)
    return case, recorded, student, objective, dataset


def projector_tensors(student) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the projector by their recorded names."""
    layer = student.get_base_model().visual_projection
    found = {
        f"{official}.{key}": tensor
        for official, own in PROJECTOR.items()
        for key, tensor in getattr(layer, f"promptkd_{own}")["default"].state_dict(keep_vars=True).items()
    }
    assert len(found) == 9
    return found


def batch_of(dataset, start: int = 0) -> dict[str, torch.Tensor]:
    """Eight images."""
    index = torch.arange(start, start + 8)
    return {"pixel_values": dataset.pixel_values[index], "labels": torch.zeros(8, dtype=torch.long), "index": index}


@torch.no_grad()
def eval_logits(student, recorded) -> torch.Tensor:
    """The model's own forward in evaluation mode, on pixels alone."""
    return student.eval()(pixel_values=recorded["in.eval_images"]).logits_per_image


@pytest.fixture(scope="module")
def step():
    return setup("D_promptkd_step")


def test_teacher_features_and_logits(step):
    case, recorded, _, objective, _ = step
    features = objective.teachers.features(recorded["in.images"], None)
    atol = case["tolerance"]["features_atol"]
    assert_close(features, recorded["expected.teacher.image_features"], rtol=0, atol=atol)
    assert_close(objective.teachers.classes[0], recorded["expected.teacher.text_features"], rtol=0, atol=atol)
    logits = objective.teachers.logits(features)
    assert_close(logits, recorded["expected.teacher.logits"], rtol=0, atol=case["tolerance"]["logits_atol"])


def test_one_step():
    """Features, logits, loss, gradients, statistics, tensors after the step, and evaluation before and after."""
    case, recorded, student, objective, dataset = setup("D_promptkd_step")
    tolerance, raw = case["tolerance"], []
    hook = student.get_base_model().visual_projection.base_layer.register_forward_hook(lambda *c: raw.append(c[2]))
    before = eval_logits(student, recorded)
    assert_close(before, recorded["expected.before.eval_logits"], rtol=0, atol=tolerance["logits_atol"])
    features = NORMALISE(image_features(student, recorded["in.eval_images"]), dim=-1)
    expected = recorded["expected.before.eval_image_features"]
    assert_close(features, expected, rtol=0, atol=tolerance["features_atol"])
    raw.clear()
    output = objective(student.train(), batch_of(dataset))
    hook.remove()
    expected = recorded["expected.student.clip_image_features_raw"]
    assert_close(raw[0], expected, rtol=0, atol=tolerance["features_atol"] * float(expected.abs().max()))
    expected = recorded["expected.student.logits_train"]
    assert_close(output.logits, expected, rtol=0, atol=tolerance["logits_atol"])
    assert output.loss.item() == pytest.approx(float(recorded["expected.loss"]), rel=tolerance["losses_rtol"])
    check_statistics(student, recorded, "expected.after_forward")
    after_forward = eval_logits(student, recorded)
    expected = recorded["expected.after_forward.eval_logits"]
    assert_close(after_forward, expected, rtol=0, atol=tolerance["eval_logits_atol"])
    output.loss.backward()
    check_gradients(student, recorded, tolerance["grads_rtol_of_max"])
    trained = [p for p in student.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.005, momentum=0.9, weight_decay=5e-4).step()
    check_tensors(student, recorded, "expected.after_step", tolerance["params_atol"])
    expected = recorded["expected.after_step.eval_logits"]
    assert_close(eval_logits(student, recorded), expected, rtol=0, atol=tolerance["eval_logits_atol"])


def check_statistics(student, recorded, group: str) -> None:
    """BatchNorm's running statistics, to 1e-4 of the largest: a mean near zero has no digits to compare."""
    found = projector_tensors(student)
    for name in ("bn.running_mean", "bn.running_var"):
        assert_close_to_max(found[name], recorded[f"{group}.proj.{name}"], 1e-4)
    assert torch.equal(found["bn.num_batches_tracked"], recorded[f"{group}.proj.bn.num_batches_tracked"])


def check_gradients(student, recorded, tolerance: float) -> None:
    """Gradients of prompts and projector; that of the bias before BatchNorm is rounding noise."""
    prompts, projector = prompt_tensors(student, prefix="promptkd_"), projector_tensors(student)
    assert sorted(prompts) == ["vision_deep", "vision_shallow"]
    for name, parameters in prompts.items():
        expected = recorded[f"expected.grad.{name}"]
        assert_close_to_max(stacked([p.grad for p in parameters], expected), expected, tolerance)
    trained = {name: tensor for name, tensor in projector.items() if tensor.requires_grad}
    assert len(trained) == 6
    for name, tensor in trained.items():
        expected = recorded[f"expected.grad.proj.{name}"].reshape(tensor.shape)
        if name == "conv1.bias":
            assert_close(tensor.grad, expected, rtol=0, atol=1e-3)
        else:
            assert_close_to_max(tensor.grad, expected, tolerance)


def check_tensors(student, recorded, group: str, atol: float) -> None:
    """Trained tensors and statistics."""
    for name, parameters in prompt_tensors(student, prefix="promptkd_").items():
        expected = recorded[f"{group}.{name}"]
        assert_close(stacked(parameters, expected), expected, rtol=0, atol=atol)
    for name, tensor in projector_tensors(student).items():
        if not name.startswith(("bn.running", "bn.num")):
            expected = recorded[f"{group}.proj.{name}"].reshape(tensor.shape)
            assert_close(tensor.detach(), expected, rtol=0, atol=atol)
    check_statistics(student, recorded, group)


def test_base_and_novel_classes_are_rows_of_the_stored_vectors():
    """The official test() of the base-to-novel protocol, through the classifier that users get."""
    case, recorded, student, objective, dataset = setup("D_promptkd_step")
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.005, 0.9, weight_decay=5e-4)
    objective(student.train(), batch_of(dataset)).loss.backward()
    optimizer.step()
    classifier = TextClassifier(student, recorded_tokenizer(), template="a photo of a {}.")
    names = case["classnames"]
    for half, chosen in (("base", names[:4]), ("novel", names[4:])):
        logits = classifier.logits_for(chosen)(recorded["in.eval_images"])
        expected = recorded[f"expected.after_step.{half}_logits"]
        assert_close(logits, expected, rtol=0, atol=case["tolerance"]["eval_logits_atol"])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("cache", ["none", "views"])
def test_five_steps_through_the_trainer(name: str, cache: str, tmp_path):
    """Losses, final tensors, statistics and evaluation logits; D3 shows whether the decay acts on every tensor."""
    case, recorded, student, objective, dataset = setup(name, teacher_cache=cache)
    optimizer, tolerance = case["optimizer"], case["tolerance"]
    objective.batch_sampler = lambda *a, **k: FixedBatches(batch_size=8, seed=0)
    args = VLMTrainingArguments(
        output_dir=str(tmp_path),
        **{"learning_rate": optimizer["lr"], "weight_decay": optimizer["weight_decay"]},
        **{"num_train_epochs": 1, "warmup_epochs": 0, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1},
    )
    trainer = VLMTrainer(student, args, train_dataset=dataset, objective=objective)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(recorded["expected.losses"].tolist(), rel=tolerance["losses_rtol"])
    check_tensors(student, recorded, "expected.final", tolerance["params_atol"])
    expected = recorded["expected.final.eval_logits"]
    assert_close(eval_logits(student, recorded), expected, rtol=0, atol=tolerance["eval_logits_atol"])


class FixedBatches(EpochBatchSampler):
    """The recorded batches in their order."""

    def __iter__(self):
        return iter([list(range(start, start + 8)) for start in range(0, 40, 8)])

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("protocol", ["base_to_new", "cross_dataset"])
def test_presets_give_the_official_learning_rate_of_every_epoch(protocol: str):
    training = preset_for(protocol).training
    rates = tensors("S_schedules")["expected.lr_epochs20_base0.005"].tolist()
    ours = [
        epoch_cosine(
            epoch,
            learning_rate=training["learning_rate"],
            num_epochs=training["num_train_epochs"],
            warmup_epochs=training["warmup_epochs"],
            warmup_rate=training["warmup_learning_rate"],
        )
        for epoch in range(20)
    ]
    assert len(rates) == 20
    assert ours == pytest.approx(rates, rel=1e-9)
