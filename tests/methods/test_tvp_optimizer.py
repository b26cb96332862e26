"""TVP's update rule and losses against numbers by hand; the rule under scalers, half precision and accumulation."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing import assert_close

from peft_vlm.losses import feature_consistency, semantic_enhancement
from peft_vlm.methods.tvp import NormalizedGradient

MASK = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


def prompt_with_gradient(values=((3.0, 0.0), (0.0, 4.0)), *, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    prompt = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    prompt.grad = torch.tensor(values, dtype=dtype)
    return prompt


def test_a_step_has_the_length_of_the_rate():
    """Norm of (3, 4) is 5; rate 10: 10 * 3/5 and 10 * 4/5."""
    prompt = prompt_with_gradient()
    NormalizedGradient([prompt]).step()
    assert_close(prompt.data, torch.tensor([[-6.0, 0.0], [0.0, -8.0]]))


def test_the_norm_is_over_all_pixels_and_the_mask_comes_after_it():
    """Norm of (2, 4, 4) is 6. Masking first would give a norm of sqrt(20) and a longer step."""
    prompt = prompt_with_gradient(((2.0, 4.0), (0.0, 4.0)))
    NormalizedGradient([prompt], lr=3.0, masks={prompt: MASK}).step()
    assert_close(prompt.data, torch.tensor([[-1.0, 0.0], [0.0, -2.0]]))


def test_every_parameter_has_a_norm_of_its_own_and_its_groups_rate():
    first, second = prompt_with_gradient(), prompt_with_gradient(((0.0, 0.0), (0.5, 0.0)))
    NormalizedGradient([{"params": [first], "lr": 5.0}, {"params": [second]}], lr=1.0).step()
    assert_close(first.data, torch.tensor([[-3.0, 0.0], [0.0, -4.0]]))
    assert_close(second.data, torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))


def test_no_gradient_no_step():
    """The start of FCA and a batch without effect must not divide 0 by 0."""
    prompt = prompt_with_gradient(((0.0, 0.0), (0.0, 0.0)))
    optimizer = NormalizedGradient([prompt])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(prompt.data, torch.zeros(2, 2))


def test_the_epsilon_is_seen_by_vanishing_gradients_only():
    """g = 1e-10 in one pixel: 1e-10 / (1e-10 + 1e-10) is one half."""
    prompt = prompt_with_gradient(((1e-10, 0.0), (0.0, 0.0)))
    NormalizedGradient([prompt], lr=1.0).step()
    assert_close(prompt.data[0, 0], torch.tensor(-0.5))


def test_half_precision_prompts_take_their_norm_in_float32():
    """300 squared overflows float16."""
    prompt = prompt_with_gradient(((300.0, 0.0), (0.0, 400.0)), dtype=torch.float16)
    NormalizedGradient([prompt]).step()
    assert_close(prompt.data, torch.tensor([[-6.0, 0.0], [0.0, -8.0]], dtype=torch.float16))


def test_a_gradient_scaler_changes_nothing_and_skips_overflow():
    """The factor is taken away before the step; a step with inf would end in NaN pixels."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    prompt = nn.Parameter(torch.zeros(2, 2))
    optimizer = NormalizedGradient([prompt])
    for factor in (1.0, float("inf")):
        scaler.scale((factor * torch.tensor([[3.0, 0.0], [0.0, 4.0]]) * prompt).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert_close(prompt.data, torch.tensor([[-6.0, 0.0], [0.0, -8.0]]))
    assert scaler.get_scale() == 512.0


def test_accumulated_batches_make_one_step_of_their_mean(tmp_path):
    """Normalising every batch would weigh a batch with a small gradient as much as one with a large one."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    prompt = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(prompt.weight)
    model, optimizer = accelerator.prepare(prompt, NormalizedGradient(prompt.parameters(), lr=10.0))
    for gradient in (torch.tensor([[6.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 8.0]])):
        with accelerator.accumulate(model):
            accelerator.backward((model.weight * gradient).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert_close(prompt.weight.data, torch.tensor([[-6.0, 0.0], [0.0, -8.0]]))


def test_a_schedule_sets_the_rate():
    prompt = prompt_with_gradient()
    optimizer = NormalizedGradient([prompt], lr=10.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    optimizer.step()
    scheduler.step()
    assert_close(prompt.data, torch.tensor([[-0.6, 0.0], [0.0, -0.8]]))
    again = NormalizedGradient([prompt], lr=3.0)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == pytest.approx(1.0)


def test_a_closure_gives_loss_and_gradient():
    prompt = nn.Parameter(torch.zeros(2, 2))
    optimizer = NormalizedGradient([prompt], lr=1.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (prompt * torch.tensor([[0.0, 2.0], [0.0, 0.0]])).sum() + 7
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 7.0
    assert_close(prompt.data, torch.tensor([[0.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_the_run(value: float):
    prompt = prompt_with_gradient(((value, 0.0), (0.0, 0.0)))
    with pytest.raises(FloatingPointError, match="or a loss scaler, which skips such steps"):
        NormalizedGradient([prompt]).step()
    assert torch.equal(prompt.data, torch.zeros(2, 2))


def test_wrong_settings_are_refused():
    prompt = prompt_with_gradient()
    with pytest.raises(ValueError, match=r"`lr` of 0 or more, got -1"):
        NormalizedGradient([prompt], lr=-1)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) for a parameter of shape \(2, 2\), which is among"):
        NormalizedGradient([prompt], masks={prompt: torch.ones(2, 3)})
    with pytest.raises(ValueError, match="which is not among `params`"):
        NormalizedGradient([prompt], masks={nn.Parameter(torch.zeros(2, 2)): MASK})


def test_feature_consistency_is_the_mean_length_of_the_differences():
    """Differences (3, 4), (0, 0) and (0, -2): lengths 5, 0, 2."""
    prompted = torch.tensor([[4.0, 4.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    clean = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], requires_grad=True)
    loss = feature_consistency(prompted, clean)
    assert_close(loss, torch.tensor(7 / 3))
    loss.backward()
    assert clean.grad is None
    assert_close(prompted.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]) / 3)
    assert feature_consistency(prompted.bfloat16(), clean.bfloat16()).dtype == torch.float32


def test_semantic_enhancement_is_the_mean_logit_of_the_right_class():
    logits = torch.tensor([[1.0, 20.0, 3.0], [4.0, 5.0, 30.0]], requires_grad=True)
    loss = semantic_enhancement(logits, torch.tensor([1, 0]))
    assert_close(loss, torch.tensor(12.0))
    loss.backward()
    assert_close(logits.grad, torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0]]))
