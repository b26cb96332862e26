"""Soft labels of a frozen teacher, in the two forms that "soft labels" may mean.

Revisiting Prompt Pretraining of Vision-Language Models (RPP), 2024, arXiv 2409.06166: the abstract names zero-shot
probabilities of a pretrained CLIP teacher; form, temperature and weight are not published.
"""

from jaxtyping import Float
from torch import Tensor

from peft_vlm.losses.distillation import distillation_loss

FORMS = ("kl", "cross_entropy")


def soft_label_loss(
    student_logits: Float[Tensor, "batch sampled"],
    teacher_logits: Float[Tensor, "batch sampled"],
    *,
    form: str = "kl",
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Distance to the teacher's class probabilities, mean over the images, in float32; the weight is the objective's.

    Formula: "kl": T^2 * KL(softmax(t / T) || softmax(s / T)); "cross_entropy": the same plus T^2 times the entropy of
        the teacher, which is -T^2 * sum_c softmax(t / T)_c log softmax(s / T)_c. Both have the same gradient; only the
        first is 0 where student and teacher agree.

    Args:
        student_logits: Logits already multiplied by the student's logit scale.
        teacher_logits: Logits of the same classes, multiplied by the teacher's; they receive no gradient.
        form: One of `FORMS`.
        temperature: T.

    Raises:
        ValueError: If the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"Expected `soft_form` to be one of {FORMS!r}, got {form!r}.")
    divergence = distillation_loss(student_logits, teacher_logits, temperature=temperature)
    if form == "kl":
        return divergence
    log_teacher = (teacher_logits.detach().float() / temperature).log_softmax(dim=-1)
    entropy = -(log_teacher.exp() * log_teacher).sum(dim=-1).mean()
    return divergence + temperature**2 * entropy
