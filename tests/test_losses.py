"""POMP's sampled softmax and the soft-label loss against numbers computed by hand."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from peft_vlm.losses import false_negatives, local_correction, sample_negatives, sampled_logits, soft_label_loss

LABELS, NEGATIVES = torch.tensor([2, 0]), torch.tensor([2, 1, 3])


@pytest.mark.parametrize(("form", "base"), [("ln", math.e), ("log10", 10.0)])
def test_negatives_stand_for_all_wrong_classes(form: str, base: float):
    """N = 9, three negatives: two valid ones for the first image, whose own class was drawn, three for the second."""
    rejected = false_negatives(LABELS, NEGATIVES)
    assert rejected.tolist() == [[True, False, False], [False, False, False]]
    correction = local_correction(rejected, num_classes=9, form=form)
    assert correction.tolist() == pytest.approx([math.log(8 / 2, base), math.log(8 / 3, base)])


def test_sampled_logits_and_loss_by_hand():
    """First image: own class 1.0; the drawn own class is masked; 0.5 and -1.0 are raised by ln 4."""
    rejected = false_negatives(LABELS, NEGATIVES)
    positive, negative = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.5, -1.0], [0.2, 0.3, 0.4]])
    correction = local_correction(rejected, num_classes=9)
    logits = sampled_logits(positive, negative, rejected, correction)
    assert logits[0].tolist() == pytest.approx([1.0, -1e6, 0.5 + math.log(4), -1.0 + math.log(4)])
    loss = F.cross_entropy(logits, torch.zeros(2, dtype=torch.long), reduction="none")
    first = math.log(math.e + 4 * math.exp(0.5) + 4 * math.exp(-1)) - 1
    second = math.log(1 + 8 / 3 * sum(math.exp(x) for x in (0.2, 0.3, 0.4)))
    assert loss.tolist() == pytest.approx([first, second])


def test_all_classes_drawn_is_the_plain_softmax():
    """Then the correction is ln 1 for every image and the masked column is the positive's double."""
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(4, 7), torch.tensor([0, 3, 3, 6])
    negatives = sample_negatives(7, 100, generator=torch.Generator())
    assert sorted(negatives.tolist()) == list(range(7))
    rejected = false_negatives(labels, negatives)
    correction = local_correction(rejected, num_classes=7)
    sampled = sampled_logits(logits.gather(1, labels[:, None])[:, 0], logits[:, negatives], rejected, correction)
    assert_close(F.cross_entropy(sampled, torch.zeros(4, dtype=torch.long)), F.cross_entropy(logits, labels))


def test_the_natural_logarithm_estimates_the_denominator_without_bias():
    """Mean of the corrected sum of exponentials over all pairs of negatives equals the full sum over wrong classes."""
    torch.manual_seed(0)
    logits, label = torch.randn(6), torch.tensor([4])
    sums = {form: [] for form in ("ln", "log10", "none")}
    for first in range(6):
        for second in set(range(6)) - {first}:
            negatives = torch.tensor([first, second])
            rejected = false_negatives(label, negatives)
            for form, values in sums.items():
                correction = local_correction(rejected, num_classes=6, form=form)
                row = sampled_logits(logits[label], logits[negatives][None], rejected, correction)
                values.append(float(row[0, 1:].exp().sum()))
    full = float(logits.exp().sum() - logits[4].exp())
    means = {form: sum(values) / len(values) for form, values in sums.items()}
    assert means["ln"] == pytest.approx(full, rel=1e-5)
    assert means["none"] < means["log10"] < 0.8 * full


def test_an_image_without_a_valid_negative_has_no_loss_and_no_gradient():
    positive = torch.tensor([0.3], requires_grad=True)
    rejected = false_negatives(torch.tensor([1]), torch.tensor([1]))
    logits = sampled_logits(positive, torch.tensor([[0.3]]), rejected, local_correction(rejected, num_classes=5))
    loss = F.cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(positive.grad) == 0.0


def test_draws_are_different_classes_and_repeat_with_the_seed():
    draws = [sample_negatives(1000, 99, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert len(set(draws[0].tolist())) == 99
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_soft_labels_by_hand():
    """Teacher (1/2, 1/2), student (3/4, 1/4): KL = ln(2 / sqrt(3)), cross-entropy = that plus ln 2."""
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    divergence = math.log(2 / math.sqrt(3))
    assert float(soft_label_loss(student, teacher)) == pytest.approx(divergence)
    assert float(soft_label_loss(student, teacher, form="cross_entropy")) == pytest.approx(divergence + math.log(2))
    # at T = 2 logits of twice the size give the same probabilities, and the loss is multiplied by T^2 = 4
    for form, value in (("kl", divergence), ("cross_entropy", divergence + math.log(2))):
        loss = soft_label_loss(2 * student, 2 * teacher, form=form, temperature=2)
        assert float(loss) == pytest.approx(4 * value)


def test_both_forms_have_the_same_gradient_and_the_teacher_none():
    torch.manual_seed(0)
    gradients = []
    for form in ("kl", "cross_entropy"):
        student = torch.linspace(-2, 2, 6).view(2, 3).requires_grad_()
        teacher = torch.eye(3)[:2].requires_grad_()
        soft_label_loss(student, teacher, form=form, temperature=0.7).backward()
        assert teacher.grad is None
        gradients.append(student.grad)
    assert_close(gradients[0], gradients[1])


def test_rejected_classes_do_not_make_the_soft_term_infinite():
    """Their probability is 0 for student and teacher, and 0 times infinity would be NaN."""
    logits = torch.tensor([[1.0, -1e6, 0.5]])
    assert float(soft_label_loss(logits, logits.flip(0))) == 0.0
    assert torch.isfinite(soft_label_loss(logits, logits, form="cross_entropy", temperature=0.1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_correction(torch.zeros(1, 1, dtype=torch.bool), num_classes=3, form="log2"), "got 'log2'"),
        (lambda: soft_label_loss(torch.zeros(1, 2), torch.zeros(1, 2), form="mse"), "got 'mse'"),
    ],
)
def test_unknown_forms_are_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
