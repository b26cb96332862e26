"""Any adapter on a CLIP-like model in the same trainer, reports, classifier and export: PEFT's own types."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch.testing import assert_close

from peft_vlm import (
    ClassificationObjective,
    CoOpConfig,
    PromptedClassifier,
    SkipTuningConfig,
    VLMTrainer,
    VLMTrainingArguments,
)
from peft_vlm.adapters.config import adapter_settings
from peft_vlm.cli.program import main
from peft_vlm.data.dataset import ImageClassificationDataset, collate
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import AdapterError
from peft_vlm.evaluation.run import load_model
from peft_vlm.export import export_classifier
from peft_vlm.hub.adapter_folder import AdapterFolder
from peft_vlm.models.towers import towers_of
from peft_vlm.text import reserve_slots, tokenize_for_model
from tests.cases import NUM_CLASSES, class_prompts, images, perturb, processor
from tests.hub.adapters import write_images
from tests.tiny import colour_names, colour_rows, siglip_processor, tiny_clip, tiny_siglip, tiny_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj"]
#: Adapter types of PEFT, each on both towers.
TYPES = {
    "lora": lambda: LoraConfig(r=2, target_modules=ATTENTION, lora_dropout=0.1, init_lora_weights=False),
    "dora": lambda: LoraConfig(r=2, target_modules=ATTENTION, use_dora=True, init_lora_weights=False),
    "ln_tuning": lambda: LNTuningConfig(target_modules=["layer_norm1", "layer_norm2"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "embedding": lambda: LoraConfig(r=2, target_modules=["token_embedding"], init_lora_weights=False),
    "oft": lambda: OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
}
TEXT, VISION = r"text_model\..*\.(q_proj|v_proj)", r"vision_model\..*\.(q_proj|v_proj)"


def lora(target: str = "", **settings) -> LoraConfig:
    """A LoRA that acts from its start."""
    own = {"r": 2, "target_modules": target or ATTENTION, "init_lora_weights": False}
    return LoraConfig(**(own | settings))


def adapted(config, *, base=None):
    torch.manual_seed(0)
    model = get_peft_model(base or tiny_clip(), config)
    perturb(model)
    return model


def arguments(folder: Path, **settings) -> VLMTrainingArguments:
    own = {"num_train_epochs": 2, "learning_rate": 0.01, "warmup_epochs": 0, "save_strategy": "no", "seed": 3}
    return VLMTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **(own | settings))


def base_folder(folder: Path) -> Path:
    """The tiny CLIP with tokenizer and image processor on disk."""
    tiny_clip().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def trained(config, folder: Path, base: Path, **settings) -> VLMTrainer:
    torch.manual_seed(0)
    model = get_peft_model(type(tiny_clip()).from_pretrained(base), config)
    args = arguments(folder, **settings)
    trainer = VLMTrainer(model, args, train_dataset=images(), objective=ClassificationObjective(class_prompts()))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of norms, which LN tuning is made for
@pytest.mark.parametrize("kind", TYPES)
def test_any_type_of_peft_trains_saves_and_classifies(kind, tmp_path):
    """The classes of such an adapter have no place in PEFT's configuration; without them nobody could use it."""
    base = base_folder(tmp_path / "base")
    trainer = trained(TYPES[kind](), tmp_path / "run", base)
    model = trainer.model.model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) > 1
    raw = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert not {"class_names", "template", "image_mean", "format_version"} & set(raw)
    facts = json.loads((tmp_path / "run" / "peft_vlm.json").read_text())
    assert facts["class_names"] == list(class_prompts().class_names)
    assert facts["template"] == "a {}."
    assert facts["base_architecture"]["text_hidden_size"] == 32
    classifier = PromptedClassifier.from_pretrained(tmp_path / "run")
    image = images().image(0)
    inputs = processor().image_processor(image, return_tensors="pt")
    with torch.no_grad():
        ids = class_prompts().input_ids
        expected = model(**inputs, input_ids=ids).logits_per_image.softmax(-1)[0].tolist()
    found = {p.label: p.probability for p in classifier.predict(image, top_k=NUM_CLASSES)}
    assert found == pytest.approx(dict(zip(class_prompts().class_names, expected, strict=True)), rel=1e-3)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "PEFT alone loads it" in card
    assert "`red`" in card
    assert AdapterFolder.read(tmp_path / "run").method == {"dora": "lora", "embedding": "lora"}.get(kind, kind)


def test_adalora_is_refused_by_name():
    """Without its steps between the steps it would train, and never give a rank away."""
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=6, tinit=1, tfinal=1)
    assert adapter_settings(config)["total_step"] == 6
    with pytest.raises(AdapterError, match="got AdaLoRA"):
        ClassificationObjective(class_prompts()).adapt_to(get_peft_model(tiny_clip(), config), images())


def test_a_card_names_the_settings_that_are_not_defaults(tmp_path):
    base = base_folder(tmp_path / "base")
    trained(lora(r=3, lora_alpha=5), tmp_path / "run", base, max_steps=1)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| `r` | `3` |" in card
    assert "| `lora_alpha` | `5` |" in card
    assert "`loftq_config`" not in card


@pytest.mark.parametrize(("target", "pixels", "text_runs"), [(TEXT, False, 3), (VISION, True, 0), ("", True, 3)])
def test_only_what_trains_is_computed_again(target, pixels, text_runs):
    """Frozen features computed per step cost most of the time; stale ones would train on a model that is gone."""
    model, dataset = adapted(lora(target)), images()
    objective = ClassificationObjective(class_prompts())
    objective.adapt_to(model, dataset)
    assert objective.needs_pixels == pixels
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    calls: dict[str, int] = {"text": 0, "vision": 0}
    for side in calls:
        layer = getattr(model.get_base_model(), f"{side}_model").encoder.layers[0].layer_norm1
        layer.register_forward_hook(lambda *_, side=side: calls.__setitem__(side, calls[side] + 1))
    batch = collate([dataset[i] for i in (0, 7, 14)])
    for _ in range(3):
        objective(model, batch).loss.backward()
    assert calls["text"] == text_runs
    assert (calls["vision"] > 0) == pixels
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable)


@pytest.mark.parametrize("target", [TEXT, VISION, ""])
def test_stored_features_give_the_gradients_of_the_models_own_forward(target):
    """By hand: cross-entropy of `model(...).logits_per_image`, every feature computed."""
    gradients = []
    for by_hand in (True, False):
        model, dataset = adapted(lora(target)).eval(), images()
        batch = collate([dataset[i] for i in (0, 7, 14, 21)])
        if by_hand:
            output = model(pixel_values=batch["pixel_values"], input_ids=class_prompts().input_ids)
            loss = torch.nn.functional.cross_entropy(output.logits_per_image, batch["labels"])
        else:
            objective = ClassificationObjective(class_prompts())
            objective.prepare(model, dataset)
            objective.epoch_start(model, dataset, 0)
            loss = objective(model, batch).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()})
    assert len(gradients[0]) > 1
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)  # rounding of other orders of sums


def test_siglip_trains_with_its_bias(tmp_path):
    """Its scaled cosines have a bias, and its text tower reads every position."""
    model = adapted(lora(), base=tiny_siglip())
    rows = colour_rows(4, classes=NUM_CLASSES)
    dataset = ImageClassificationDataset(rows, colour_names(NUM_CLASSES), transform=EvalTransform(siglip_processor()))
    prompts = tokenize_for_model(model, tiny_tokenizer(), colour_names(NUM_CLASSES), template="a {}.")
    objective = ClassificationObjective(prompts)
    objective.prepare(model, dataset)
    batch = collate([dataset[i] for i in (0, 7, 14)])
    logits = objective(model.eval(), batch).logits
    with torch.no_grad():
        ids = reserve_slots(model, prompts).input_ids
        expected = model(pixel_values=batch["pixel_values"], input_ids=ids).logits_per_image
    assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-4)
    trainer = VLMTrainer(model.train(), arguments(tmp_path), train_dataset=dataset, objective=objective)
    trainer.train()
    assert (tmp_path / "peft_vlm.json").is_file()


@pytest.mark.parametrize(
    "config", [SkipTuningConfig(start_layer=1), CoOpConfig(num_text_tokens=2)], ids=["skip_tuning", "coop"]
)
def test_our_own_types_train_by_it_too(config):
    """A comparison of adapters needs one loss for all of them."""
    model, dataset = adapted(config), images()
    objective = ClassificationObjective(class_prompts())
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = collate([dataset[i] for i in (0, 7, 14)])
    output = objective(model, batch)
    with torch.no_grad():
        ids = reserve_slots(model, class_prompts()).input_ids
        expected = model(pixel_values=batch["pixel_values"], input_ids=ids).logits_per_image
    assert_close(output.logits.detach(), expected, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) > 0
    assert all(p.grad is not None for p in trainable)


def test_a_resumed_lora_ends_with_the_tensors_of_one_that_never_stopped(tmp_path):
    """Dropout draws from the generator of the run, whose state a checkpoint keeps."""
    base = base_folder(tmp_path / "base")
    kind = TYPES["lora"]
    whole = trained(kind(), tmp_path / "a", base, save_strategy="steps", save_steps=2, save_total_limit=None)
    args = arguments(tmp_path / "b")
    torch.manual_seed(0)
    model = get_peft_model(type(tiny_clip()).from_pretrained(base), kind())
    again = VLMTrainer(model, args, train_dataset=images(), objective=ClassificationObjective(class_prompts()))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    first, second = (get_peft_model_state_dict(trainer.model.model) for trainer in (whole, again))
    assert len(first) > 0
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert load_model(tmp_path / "a" / "checkpoint-2").class_names == class_prompts().class_names


def test_the_trainer_has_it_as_default_for_types_of_peft(tmp_path):
    model = adapted(lora())
    trainer = VLMTrainer(
        model, arguments(tmp_path), train_dataset=images(), processing_class=tiny_tokenizer(), template="a {}."
    )
    assert type(trainer.objective) is ClassificationObjective


def test_an_export_of_a_lora_is_merged_and_equal(tmp_path):
    base = base_folder(tmp_path / "base")
    trained(lora(), tmp_path / "run", base)
    exported = export_classifier(tmp_path / "run")
    image = images().image(0)
    expected = PromptedClassifier.from_pretrained(tmp_path / "run").predict(image)[0]
    assert exported.predict([image])[0][0] == (expected.label, pytest.approx(expected.probability, rel=1e-3))


def test_another_base_and_a_damaged_record_are_named(tmp_path):
    """PEFT's own message for another base is a list of sizes."""
    base = base_folder(tmp_path / "base")
    trained(lora(), tmp_path / "run", base, max_steps=1)
    other = tmp_path / "other"
    tiny_clip(layers=4).save_pretrained(other)
    processor().save_pretrained(other)
    with pytest.raises(AdapterError, match="text_num_hidden_layers: adapter 3, this model 4"):
        load_model(tmp_path / "run", base_model=other)
    record = tmp_path / "run" / "peft_vlm.json"
    for text, message in (
        ("[1]", "names and values"),
        ('{"class_names": 3}', "`class_names` to be a list of text"),
        ("{", "damaged"),
        ('{"format_version": 99}', "Install a newer release"),
    ):
        record.write_text(text)
        with pytest.raises(AdapterError, match=message):
            load_model(tmp_path / "run")
    record.unlink()
    assert load_model(tmp_path / "run").class_names is None


def test_a_lora_of_somebody_else_is_evaluated_with_the_classes_of_the_data(tmp_path):
    """It has no record, so its card stays as it is, and the images say which classes there are."""
    model = adapted(lora(), base=type(tiny_clip()).from_pretrained(base_folder(tmp_path / "base")))
    model.save_pretrained(tmp_path / "run")
    before = (tmp_path / "run" / "README.md").read_text()
    data = write_images(tmp_path / "colours")
    words = ["evaluate", "--adapter", str(tmp_path / "run"), "--dataset", str(data), "--template", "a {}."]
    assert main([*words, "--output_dir", str(tmp_path / "run"), "--protocol", "zero-shot"]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    assert (tmp_path / "run" / "README.md").read_text() == before


def test_peft_alone_loads_what_was_trained_here(tmp_path):
    """A LoRA must not tie its users to this package."""
    base = base_folder(tmp_path / "base")
    model = trained(lora(), tmp_path / "run", base).model.model.eval()
    pixels = torch.stack([images()[i]["pixel_values"] for i in range(2)])
    ids = class_prompts().input_ids
    torch.save({"pixel_values": pixels, "input_ids": ids}, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import CLIPModel\n"
        "base, adapter, inputs, output = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter).eval()\n"
        "assert not any(name.startswith('peft_vlm') for name in sys.modules)\n"
        "with torch.no_grad(): logits = model(**torch.load(inputs)).logits_per_image\n"
        "torch.save(logits, output)\n"
    )
    paths = [str(tmp_path / name) for name in ("base", "run", "inputs.pt", "logits.pt")]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model(pixel_values=pixels, input_ids=ids).logits_per_image
    assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_trained_sides_are_those_of_the_lora():
    assert towers_of(adapted(lora(TEXT))).trained_sides() == {"text"}
    assert towers_of(adapted(lora(VISION))).trained_sides() == {"vision"}
    assert isinstance(adapted(lora()), PeftModel)
