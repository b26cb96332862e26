"""TVP on several models at once, and on models whose language model has an encoder."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, T5Config

from peft_vlm import TVPConfig
from peft_vlm.data import QuestionCollator, model_inputs
from peft_vlm.errors import DataError
from peft_vlm.methods.tvp import Source, TVPObjective
from tests.methods.tvp_models import (
    batch,
    gradient,
    objective,
    prepared,
    prompt_parameter,
    prompted_llava,
    questions,
    second_model,
)
from tests.tiny import clip_processor
from tests.tiny_mllm import VOCAB_SIZE, mllm_tokenizer, tiny_mllm
from tests.tiny_questions import colour_questions


def blip_collator(**settings) -> QuestionCollator:
    """Images of 24 px and four image tokens."""
    processor = Blip2Processor(tiny_mllm("blip_2").image_processor, mllm_tokenizer(), num_query_tokens=4)
    return QuestionCollator(processor, **settings)


def blip(*, encoder: bool = False):
    """BLIP-2 with OPT or T5."""
    if not encoder:
        return tiny_mllm("blip_2").model
    text = T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    config = tiny_mllm("blip_2").model.config.to_dict() | {"text_config": text.to_dict()}
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(Blip2Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def prompted_blip(*, encoder: bool = False) -> PeftModel:
    """BLIP-2 with the prompt of the tiny LLaVA."""
    processor = tiny_mllm("blip_2").image_processor
    model = get_peft_model(blip(encoder=encoder), TVPConfig.for_processor(processor, canvas_size=32, border=5)).eval()
    with torch.no_grad():
        prompt_parameter(model).copy_(prompt_parameter(prompted_llava()))
    return model


def test_averaged_sources_have_the_mean_gradient():
    """Of the language and FCA terms; each model on its own batches, with its own image size and tokenizer."""
    dataset, blip_dataset = questions(), colour_questions(1, collator=blip_collator())
    alone = [(prompted_llava(), dataset), (prompted_blip(), blip_dataset)]
    gradients, terms = [], []
    for model, images in alone:
        target = prepared(model, images, tse_weight=0)
        gradients.append(gradient(model, target, batch(images)))
        terms.append(target(model, batch(images)).loss_terms)
    model = prompted_llava()
    other = Source(blip(), blip_dataset, processor=tiny_mllm("blip_2").image_processor)
    both = prepared(model, dataset, tse_weight=0, sources=[other])
    assert_close(gradient(model, both, batch(dataset)), (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-6)
    for name in ("language", "fca"):
        assert_close(both(model, batch(dataset)).loss_terms[name], (terms[0][name] + terms[1][name]) / 2)
    assert all(g.abs().max() > 1e-4 for g in gradients)
    assert not any(p.requires_grad for n, p in other.model.named_parameters() if "tvp_prompt" not in n)


def test_alternating_sources_take_turns_also_after_a_resume():
    dataset, model = questions(), prompted_llava()
    other = Source(second_model(), questions(), processor=clip_processor())
    target = prepared(model, dataset, sources=[other], source_mode="alternate")
    losses = [target(model, batch(dataset)).loss.item() for _ in range(3)]
    assert losses[0] == losses[2] != losses[1]
    fresh = prompted_llava()
    again = prepared(fresh, dataset, sources=[other], source_mode="alternate")
    again.load_state_dict(target.state_dict())
    assert again(fresh, batch(dataset)).loss.item() == losses[1]
    with pytest.raises(ValueError, match="run with another mode"):
        objective().load_state_dict(target.state_dict())


def test_sources_draw_the_crops_of_the_epoch():
    """A source that stayed in the first epoch would train on other images than the model beside it."""
    other = Source(second_model(), questions(), processor=clip_processor())
    dataset, model = questions(), prompted_llava()
    target = prepared(model, dataset, sources=[other])
    target.epoch_start(model, dataset, 4)
    assert [run_images.epoch for run_images in target._source_images] == [4]
    assert other.dataset.epoch == 0, "the user's own dataset is not changed"


def test_sources_must_show_the_same_images():
    other = Source(second_model(), questions().select([1, 0, 2, 3, 4, 5]), processor=clip_processor())
    with pytest.raises(DataError, match=r"dataset of source 0.*with_collator"):
        prepared(prompted_llava(), questions(), sources=[other])


@pytest.mark.parametrize("encoder", [False, True])
def test_blip2_trains_with_either_kind_of_language_model(encoder: bool):
    """The loss is the model's own; a decoder behind an encoder gets the answer alone."""
    model = prompted_blip(encoder=encoder)
    dataset = colour_questions(1, collator=blip_collator(encoder_decoder=encoder))
    target = TVPObjective(None, tse_weight=0, fca_weight=0.1)
    target.prepare(model, dataset)
    target.epoch_start(model, dataset, 0)
    columns: dict[str, Tensor] = batch(dataset)
    output = target(model, columns)
    labels = columns["token_labels"]
    assert torch.equal(output.labels, labels[labels != -100])
    if encoder:
        expected = model(**model_inputs(columns), labels=labels).loss
    else:
        logits = model(**model_inputs(columns)).logits[:, :-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss_terms["language"], expected)
    assert gradient(model, target, columns).abs().max() > 1e-5


def test_recomputed_layers_have_no_dropout():
    """OPT's layers drop out by themselves, and recompute in training mode only."""
    config = blip().config.to_dict()
    config["text_config"] |= {"dropout": 0.5}
    base = Blip2ForConditionalGeneration(Blip2Config(**config))
    base.load_state_dict(blip().state_dict())
    base.activation_checkpointing_enable()
    model = get_peft_model(base, TVPConfig.for_processor(tiny_mllm("blip_2").image_processor))
    dataset = colour_questions(1, collator=blip_collator())
    target = TVPObjective(None, tse_weight=0, fca_weight=0)
    target.prepare(model, dataset)
    losses = [target(model.train(), batch(dataset)).loss.item() for _ in range(3)]
    assert losses == [target(model.eval(), batch(dataset)).loss.item()] * 3
    assert base.language_model.model.decoder.layers[0].training, "it is recomputed"


def test_sources_recompute_if_the_trained_model_does():
    """The trainer sees its own model alone; a second large model would need the memory that was to be saved."""
    for enable in (False, True):
        model, other = prompted_llava(), Source(second_model(), questions(), processor=clip_processor())
        if enable:
            model.get_base_model().activation_checkpointing_enable()
        target = prepared(model, questions(), tse_weight=0, sources=[other])
        assert other.model.is_activation_checkpointing == enable
        assert gradient(model, target, batch(questions())).abs().max() > 1e-4
