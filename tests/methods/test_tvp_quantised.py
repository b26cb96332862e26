"""A prompt trained through a frozen base with 4-bit or 8-bit weights and recomputed activations.

Needs `bitsandbytes`, which is no dependency: `pip install bitsandbytes`, then `make test-slow`.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.methods.tvp_models import batch, gradient, prepared, prompt_parameter, prompted_llava, questions
from tests.tiny import _randomised
from tests.tiny_mllm import IMAGE, clip_vision, llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of bitsandbytes about kernels of this processor
]
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # blocks of 4-bit weights are 64 wide


def wide_llava() -> LlavaForConditionalGeneration:
    """A LLaVA that is wide enough to be quantised."""
    parts = {"vision_config": clip_vision(32) | WIDE, "text_config": llama() | WIDE}
    model = _randomised(LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=IMAGE)), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return model


def quantised(folder, bits: int) -> LlavaForConditionalGeneration:
    """The same model, loaded as a large one would be."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    wide_llava().save_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, local_files_only=True
    )
    for module in model.modules():
        # a processor with AVX-512 packs weights for inference in the first pass, and they have no gradient afterwards
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(("bits", "similarity"), [(4, 0.8), (8, 0.95)])  # 0.900 and 0.999 were seen
def test_a_prompt_learns_through_quantised_weights(tmp_path, bits: int, similarity: float):
    """Gradients reach the pixels, point where those of the full weights point, and lower the loss."""
    pytest.importorskip("bitsandbytes")
    dataset = questions()
    exact = prompted_llava(model=wide_llava())
    expected = gradient(exact, prepared(exact, dataset), batch(dataset))
    base = quantised(tmp_path, bits)
    assert base.model.language_model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    base.activation_checkpointing_enable()
    model = prompted_llava(model=base)
    target = prepared(model, dataset)
    actual = gradient(model, target, batch(dataset))
    assert nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > similarity
    optimizer = target.optimizer(model, learning_rate=0.5)
    losses = []
    for _ in range(5):
        loss = target(model.train(), batch(dataset)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert prompt_parameter(model).dtype == torch.float32
    assert_close(torch.tensor(losses[0]), prepared(exact, dataset)(exact, batch(dataset)).loss, rtol=0.05, atol=0.05)
    assert target.predict(model, batch(dataset)).shape == (6, 6)
