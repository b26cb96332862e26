"""What the language model gets of an image, on every architecture."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.vision import encode_visual_tokens, record_visual_tokens
from tests.tiny import noise_image
from tests.tiny_mllm import ARCHITECTURES, tiny_mllm


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_visual_tokens_of_every_architecture(name: str):
    """As many as the text has places for, the same from the whole model and from its vision side alone."""
    assert len(ARCHITECTURES) == 12
    mllm = tiny_mllm(name)
    columns = mllm.inputs([noise_image(40, 24), noise_image(40, 24, seed=1)])
    with torch.no_grad(), record_visual_tokens(mllm.model) as recorded:
        mllm.model(**columns)
    counts = (columns["input_ids"] == mllm.model.config.image_token_id).sum(dim=1)
    width = mllm.model.get_input_embeddings().embedding_dim
    assert recorded.tokens.shape == (int(counts.sum()), width)
    with torch.no_grad():
        assert_close(encode_visual_tokens(mllm.model, columns), recorded.tokens)
    first, second = recorded.tokens.split(counts.tolist())
    assert (first - second).abs().max() > 1e-3
    assert "get_image_features" not in vars(mllm.model) | vars(mllm.model.base_model)


def test_recording_needs_images_and_a_model_that_makes_tokens():
    mllm = tiny_mllm("llava")
    with record_visual_tokens(mllm.model) as recorded, torch.no_grad():
        mllm.model(input_ids=torch.tensor([[257, 5]]))
    with pytest.raises(UnsupportedModelError, match="the batch has no images"):
        assert recorded.tokens is None
    with pytest.raises(UnsupportedModelError, match="AutoModelForImageTextToText"):
        encode_visual_tokens(nn.Linear(2, 2), {})


def test_two_recordings_at_once_see_the_same():
    mllm = tiny_mllm("llava")
    columns = mllm.inputs([noise_image(32, 32)])
    with torch.no_grad(), record_visual_tokens(mllm.model) as outer:
        with record_visual_tokens(mllm.model) as inner:
            mllm.model(**columns)
        mllm.model(**columns)
    assert torch.equal(torch.cat([inner.tokens, inner.tokens]), outer.tokens)
