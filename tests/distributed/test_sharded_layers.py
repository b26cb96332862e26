"""Frozen layers divided by torch's `fully_shard`: each adapter's loss and gradients stay those of one process.

The trainer refuses FSDP (`docs/scaling.md` says what is missing); this is the part that holds already.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_vlm import CoOpConfig, MaPLeConfig, PromptSRCConfig, RPPConfig, SkipTuningConfig, TVPConfig
from peft_vlm.models.towers import towers_of, unwrap
from peft_vlm.text import ClassPrompts, reserve_slots, tokenize_for_model
from tests import forked
from tests.tiny import tiny_clip, tiny_tokenizer

BOTH: dict[str, Any] = {"text_depth": 2, "vision_depth": 2, "num_text_tokens": 2, "context_init": None}
CONFIGS: dict[str, Callable[[], Any]] = {
    "coop": lambda: CoOpConfig(num_text_tokens=2, context_init=None),
    "promptsrc": lambda: PromptSRCConfig(**BOTH),
    "maple": lambda: MaPLeConfig(depth=2, context_init=None),
    "skip_tuning": lambda: SkipTuningConfig(start_layer=1),
    "rpp": lambda: RPPConfig(**BOTH),
    "tvp": lambda: TVPConfig(canvas_size=16, border=3, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "lora": lambda: LoraConfig(target_modules=r".*_model.*(q|v)_proj", r=2, init_lora_weights=False),
}
#: Of the loss, and of a gradient as a share of the largest: other orders of float32 sums.
LOSS, GRADIENT = 2e-6, 1e-5


def loss_of(model: PeftModel, prompts: ClassPrompts, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy through both towers."""
    towers, ids = towers_of(model), reserve_slots(model, prompts).input_ids
    features = towers.finish_image(towers.embed_image(images), 0)
    texts = towers.finish_text(towers.embed_text(ids), ids, 0)
    return nn.functional.cross_entropy(towers.similarity_logits(features, texts), labels)


def adapted(method: str) -> PeftModel:
    """A model with equal values in every process."""
    torch.manual_seed(0)
    return get_peft_model(tiny_clip(), CONFIGS[method]())


def gradients(model: PeftModel) -> Tensor:
    """All of them, one behind the other."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def shard_layers(model: PeftModel) -> int:
    """Divide the frozen parameters of each transformer layer; how many there are.

    Trained tensors, embeddings, norms outside of layers and the scalar logit scale stay whole in every process.
    """
    base: Any = unwrap(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (*base.text_model.encoder.layers, *base.vision_model.encoder.layers):
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
    return sum(isinstance(p, DTensor) and not p.requires_grad for p in model.parameters())


def compare(folder: str) -> None:
    """Losses and gradients of two processes that each hold half of the layers and half of the images."""
    warnings.simplefilter("ignore")  # of torch, about views that this forward pass does not change
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    for method in CONFIGS:
        plain, sharded = adapted(method), adapted(method)
        prompts = tokenize_for_model(plain, tiny_tokenizer(), ["cat", "dog", "bee"], template="a {}.")
        expected = loss_of(plain, prompts, images, labels)
        expected.backward()
        count = shard_layers(sharded)
        mine = slice(2 * rank, 2 * rank + 2)
        loss = loss_of(sharded, prompts, images[mine], labels[mine])
        loss.backward()
        total, gradient, wanted = loss.detach().clone(), gradients(sharded), gradients(plain)
        distributed.all_reduce(total)
        distributed.all_reduce(gradient)
        worst = ((gradient / 2 - wanted).abs().max() / wanted.abs().max()).item()
        found[method] = {"sharded": count, "loss": abs(total.item() / 2 - expected.item()), "gradient": worst}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_sharded_frozen_layers_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    """A layer that ran with its part of the weights, or a tower that passed by its hooks, would train noise."""
    forked.run_group(tmp_path, compare, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(found) == set(CONFIGS)
        for method, result in found.items():
            # 16 weights and biases of each of 6 layers; Skip Tuning's copies of layers come on top, undivided.
            assert result["sharded"] == 96, method
            assert result["loss"] < LOSS, method
            assert result["gradient"] < GRADIENT, method
