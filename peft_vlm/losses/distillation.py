"""Distillation of a teacher's class probabilities into a student.

References:
    PromptKD: Unsupervised Prompt Distillation for Vision-Language Models, 2024, arXiv 2403.02781, Eq. 5; the divisor
    of the official code. Several teachers: The Professor, 2026, arXiv 2606.23897.
"""

from jaxtyping import Float
from torch import Tensor, nn

REDUCTIONS = ("official", "batchmean")
TEACHER_WEIGHTINGS = ("equal", "confidence")


def distillation_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float | int = 1.0,
    reduction: str = "batchmean",
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence from the student to the teacher, in float32; the weight is the objective's.

    Formula: T^2 * sum_i KL(softmax(t_i / T) || softmax(s_i / T)) / n, with n = batch ("batchmean": mean over the
        images) or n = batch * classes ("official": mean over all entries).

    Args:
        student_logits: Logits already multiplied by the student's logit scale.
        teacher_logits: Logits already multiplied by the teacher's; they receive no gradient.
        temperature: T.
        reduction: One of `REDUCTIONS`.

    Raises:
        ValueError: If the reduction is unknown.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"Expected `reduction` to be one of {REDUCTIONS!r}, got {reduction!r}.")
    student = nn.functional.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = nn.functional.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    total = nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / (student.numel() if reduction == "official" else len(student))


def average_teachers(
    logits: Float[Tensor, "teachers batch classes"], *, weighting: str = "equal"
) -> Float[Tensor, "batch classes"]:
    """One set of logits from several teachers: an average of logits, not of probabilities.

    The softmax of the result is the normalised (weighted) geometric mean of the teachers' probabilities: a class that
    one teacher rules out stays out, and a teacher with a larger logit scale counts more.

    Formula: sum_k w_ki t_ki with w_ki = 1 / K ("equal"), or w_ki = max_c softmax(t_ki)_c, divided by its sum over the
        teachers ("confidence": per image, the surer teacher counts more).

    Args:
        logits: Logits of each teacher, multiplied by its own logit scale.
        weighting: One of `TEACHER_WEIGHTINGS`.

    Raises:
        ValueError: If the weighting is unknown.
    """
    if weighting not in TEACHER_WEIGHTINGS:
        raise ValueError(f"Expected `weighting` to be one of {TEACHER_WEIGHTINGS!r}, got {weighting!r}.")
    if weighting == "equal":
        return logits.float().mean(dim=0)
    confidence = logits.float().softmax(dim=-1).amax(dim=-1, keepdim=True)
    return (logits.float() * confidence / confidence.sum(dim=0)).sum(dim=0)
