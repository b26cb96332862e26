"""The estimate of memory before the first step against what autograd really keeps."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel

from peft_vlm import (
    CoOpConfig,
    CoOpObjective,
    PromptKDConfig,
    PromptKDObjective,
    PromptSRCConfig,
    PromptSRCObjective,
    RPPConfig,
    RPPObjective,
    SkipTuningConfig,
    SkipTuningObjective,
    TVPConfig,
    TVPObjective,
)
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import PeftVLMError, PeftVLMWarning
from peft_vlm.text.prompts import tokenize_classes
from peft_vlm.training import memory_estimate
from peft_vlm.training.memory_estimate import estimate_memory
from tests.cases import class_prompts, images
from tests.short_run import train
from tests.tiny import CONTEXT_LENGTH, clip_processor, tiny_tokenizer

BATCH = 6


def wide_clip() -> CLIPModel:
    """Towers that are wide enough for small tensors not to count: 128, 6 layers, 64 px, 65 tokens."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 2}
    text = {"vocab_size": 514, "max_position_embeddings": CONTEXT_LENGTH, "bos_token_id": 512}
    text |= {"eos_token_id": 513, "pad_token_id": 513}
    vision = {"image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=64))


CASES = {
    "coop": (lambda: CoOpConfig(num_text_tokens=2), CoOpObjective),
    "promptsrc": (
        lambda: PromptSRCConfig(
            num_text_tokens=2, text_depth=3, vision_depth=3, num_vision_tokens=2, context_init=None
        ),
        PromptSRCObjective,
    ),
    "promptkd": (
        lambda: PromptKDConfig(
            class_dim=64, num_classes=6, vision_depth=3, num_vision_tokens=2, projector_norm="layernorm"
        ),
        lambda prompts: PromptKDObjective(prompts, teacher=wide_clip()),
    ),
    "rpp": (
        lambda: RPPConfig(num_text_tokens=2, text_depth=3, num_vision_tokens=2, vision_depth=3, context_init=None),
        lambda prompts: RPPObjective(prompts, soft_weight=0.0),
    ),
    "skip_tuning": (
        lambda: SkipTuningConfig(start_layer=3),
        lambda prompts: SkipTuningObjective(prompts, batch_composition="random", image_cache="none"),
    ),
    "tvp": (
        lambda: TVPConfig.for_processor(clip_processor(64), canvas_size=64, border=6),
        lambda prompts: TVPObjective(prompts, tse_weight=0.0),
    ),
}


def arguments(device: str = "cpu") -> SimpleNamespace:
    """What the estimate reads of a run's settings."""
    return SimpleNamespace(
        **{"per_device_train_batch_size": BATCH, "optim": "sgd", "bf16": False, "fp16": False},
        activation_checkpointing=False,
        device=torch.device(device),
    )


def kept_bytes(model, objective, batch) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, parameters apart; shared storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = objective(model, batch)
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", CASES)
def test_the_estimate_of_activations_is_what_autograd_keeps(method: str) -> None:
    """An estimate far above refuses runs that fit; one far below lets them die."""
    config, make = CASES[method]
    model, objective = get_peft_model(wide_clip(), config()).train(), make(class_prompts())
    dataset = images().with_transform(EvalTransform(clip_processor(64)))
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = dataset.collate([dataset[position] for position in range(0, 24, 4)])
    args = arguments()
    estimate = estimate_memory(model, objective, dataset, args)
    assert len(batch["index"]) == BATCH
    actual = kept_bytes(model, objective, batch)
    # the last layer computes one token only, and small tensors are left out
    assert 0.8 <= estimate.activations / actual <= 1.4, (estimate.activations, actual)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.training == trained * (4 if method == "tvp" else 8)
    args.bf16, args.optim = True, "adamw_torch"
    half = estimate_memory(model, objective, dataset, args)
    assert half.activations * 2 == estimate.activations
    assert half.training == trained * (4 if method == "tvp" else 12)
    args.activation_checkpointing = True
    assert estimate_memory(model, objective, dataset, args).activations < 0.6 * half.activations


@pytest.mark.parametrize(("sampled", "chunk", "rows"), [(4, 256, 9), (100, 256, 105), (100, 16, 16), (1000, 256, 120)])
def test_classes_that_are_not_drawn_take_no_memory(sampled: int, chunk: int, rows: int) -> None:
    """Counting all of 22,000 classes would refuse runs that take a few gigabytes."""
    names = [f"thing {number}" for number in range(120)]
    prompts = tokenize_classes(tiny_tokenizer(), names, template="a {}.", max_length=CONTEXT_LENGTH)
    objective = RPPObjective(prompts, soft_weight=0.0, num_sampled_classes=sampled, text_chunk_size=chunk)
    assert objective.text_rows(BATCH) == rows


@pytest.mark.parametrize("method", ["rpp", "promptkd"])
def test_teachers_count_and_models_elsewhere_are_still_to_come(method: str) -> None:
    """A teacher moves to the GPU after the check; weights that are there already are no longer free memory."""
    teacher, prompts = wide_clip(), class_prompts()
    objective = {"rpp": RPPObjective, "promptkd": PromptKDObjective}[method](prompts, teacher=teacher)
    model, dataset = get_peft_model(wide_clip(), CASES[method][0]()), images()
    size = sum(t.numel() * t.element_size() for m in (model, teacher) for t in (*m.parameters(), *m.buffers()))
    here, there = (estimate_memory(model, objective, dataset, arguments(device)) for device in ("cpu", "cuda"))
    assert here.weights == there.weights == size
    assert there.needed - here.needed == size
    assert here.needed == here.training + here.activations


def test_processes_of_a_machine_share_its_memory(monkeypatch) -> None:
    """Eight processes that each fit alone would die together."""
    monkeypatch.setattr(memory_estimate, "free_ram", lambda: 1001)
    monkeypatch.setattr(memory_estimate, "local_place", lambda: (1, 4))
    assert memory_estimate.free_memory(torch.device("cpu")) == 250


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch) -> None:
    """Hours of caching would end in a killed process."""
    monkeypatch.setattr(memory_estimate, "free_ram", lambda: 1000)
    with pytest.raises(PeftVLMError, match="Expected 0.0 MB of free memory to suffice.*batch_size=2"):
        train(tmp_path, "promptsrc", save_strategy="no")
    with pytest.warns(PeftVLMWarning, match="free memory to suffice"):
        train(tmp_path, "promptsrc", save_strategy="no", max_steps=1, memory_check="warn")
    train(tmp_path, "promptsrc", save_strategy="no", max_steps=1, memory_check="off")


def test_a_run_says_how_it_goes(tmp_path, capsys) -> None:
    """A launcher that starts one process instead of two shows here, and nowhere else."""
    train(tmp_path, "coop", save_strategy="no", disable_tqdm=False, max_steps=7, learning_rate=0.02)
    printed = capsys.readouterr().err
    assert "Training in 1 process on cpu: 4 images per step (4 per process, 1 accumulated), 7 steps to go." in printed
    assert "Epoch 1 of 2: loss " in printed
    assert " images/s, " in printed
    assert " left, peak memory " in printed
