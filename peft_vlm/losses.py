"""Losses of the methods as pure tensor functions; weights are applied by the objectives.

| functions | paper |
|---|---|
| sampled softmax: `sample_negatives` to `sampled_logits` | POMP, 2023, arXiv 2304.04704, Sec. 3.2, and its code |
| class selection: `num_top_classes` to `selected_classes` | Skip Tuning, CVPR 2025, arXiv 2412.11509 |
| `distillation_loss`, `average_teachers` | PromptKD, CVPR 2024, arXiv 2403.02781 |
| `feature_consistency`, `semantic_enhancement` | TVP, CVPR 2024, arXiv 2404.11207 |
| `feature_distance` | PromptSRC, ICCV 2023, arXiv 2307.06948 |
| `soft_label_loss` | RPP, 2024, arXiv 2409.06166 |
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from peft_vlm.errors import check_choice

CORRECTIONS = ("ln", "log10", "none")
REJECTED_LOGIT = -1e6
"""Logit of a rejected negative: zero probability in float32, and still finite (official code)."""


def sample_negatives(num_classes: int, count: int, *, generator: torch.Generator) -> Int[Tensor, " selected"]:
    """Draw different classes uniformly from all classes; the classes of the batch's own images may be among them.

    Args:
        num_classes: Number of all classes N.
        count: How many to draw, K - 1 with K classes per step; all classes where there are no more.
        generator: Source of the draw, on the CPU.
    """
    return torch.randperm(num_classes, generator=generator)[:count]


def false_negatives(
    labels: Int[Tensor, " batch"], negatives: Int[Tensor, " selected"]
) -> Bool[Tensor, "batch selected"]:
    """Mask of sampled classes that are an image's own class, and therefore no negatives for it.

    Args:
        labels: Right class of each image.
        negatives: Sampled classes.
    """
    return labels[:, None] == negatives


def local_correction(
    rejected: Bool[Tensor, "batch selected"], *, num_classes: int, form: str = "ln"
) -> Float[Tensor, " batch"]:
    """Term added to the logits of an image's negatives, so that they represent all wrong classes.

    Formula: log(N - 1) - log(valid negatives of the image). With the natural logarithm the sum over the sampled
        exponentials is an unbiased estimate of the sum over all wrong classes; the base-10 logarithm, in the official
        code since commit 871ef33, is not.

    Args:
        rejected: What `false_negatives` gave.
        num_classes: Number of all classes N.
        form: One of `CORRECTIONS`.

    Raises:
        ValueError: If the form is unknown.
    """
    check_choice("correction", form, CORRECTIONS)
    valid = (~rejected).sum(dim=1).clamp(min=1).float()  # without a valid negative every column is masked anyway
    if form == "none":
        return torch.zeros_like(valid)
    natural = math.log(max(num_classes - 1, 1)) - valid.log()
    return natural if form == "ln" else natural / math.log(10.0)


def sampled_logits(
    positive: Float[Tensor, " batch"],
    negative: Float[Tensor, "batch selected"],
    rejected: Bool[Tensor, "batch selected"],
    correction: Float[Tensor, " batch"],
) -> Float[Tensor, "batch sampled"]:
    """Logits over an image's own class, in column 0, and the sampled ones, in float32; the target is column 0.

    Args:
        positive: Scaled logit of each image's own class.
        negative: Scaled logits of the sampled classes, the same for all images.
        rejected: What `false_negatives` gave.
        correction: What `local_correction` gave.
    """
    # The own class is not corrected: it is always there, with probability 1.
    negative = (negative.float() + correction[:, None]).masked_fill(rejected, REJECTED_LOGIT)
    return torch.cat([positive.float()[:, None], negative], dim=1)


TAIL_RANGE = 5.0
"""The exponential density is taken on [0, 5] over the tail ranks (official code)."""


def num_top_classes(num_classes: int, *, top_ratio: float | int, max_top: int) -> int:
    """Number of most similar classes that are always selected.

    Args:
        num_classes: Number of classes C.
        top_ratio: A share of the classes up to 1, or above 1 an absolute number. Paper: r; official `TOP_RATIO`.
        max_top: Upper bound, official `MAX_TOP`. As in the official code, `top_ratio` = 1 ignores it.

    Raises:
        ValueError: If a value is not positive.
    """
    if not 0 < top_ratio < math.inf or max_top < 1:
        raise ValueError(f"Expected `top_ratio` > 0 and `max_top` >= 1, got {top_ratio!r} and {max_top!r}.")
    if top_ratio == 1:
        return num_classes
    wanted = top_ratio * num_classes if top_ratio < 1 else min(top_ratio, num_classes)
    return min(math.ceil(wanted), max_top, num_classes)


def rank_keep_probability(num_classes: int, num_top: int, *, tail_scale: float) -> Float[Tensor, " classes"]:
    """Probability in [0, 1] that the class at each similarity rank is selected, rank 0 being the most similar.

    1 for the first `num_top` ranks; after them an exponential density, min-max normalised, so that the first tail
    rank has probability 1 and the last 0.

    Args:
        num_classes: Number of classes C.
        num_top: Ranks that are always selected.
        tail_scale: Scale of the exponential distribution. Paper: lambda; official `LAMBDA`, default 0.3.

    Returns:
        Probabilities by rank, float32.

    Raises:
        ValueError: If `tail_scale` is not positive.

    Deviation: With a single tail rank the official normalisation divides 0 by 0 and never keeps the class; here it has
    probability 1, the value of the first tail rank.
    """
    if not 0 < tail_scale < math.inf:
        raise ValueError(f"Expected `tail_scale` > 0, got {tail_scale!r}.")
    num_tail = num_classes - num_top
    probability = torch.ones(num_classes, dtype=torch.float64)
    if num_tail > 1:
        density = torch.exp(-torch.linspace(0, TAIL_RANGE, num_tail, dtype=torch.float64) / tail_scale)
        probability[num_top:] = (density - density.min()) / (density.max() - density.min())
    return probability.float()


def rank_classes(
    image_features: Float[Tensor, "batch dim"], prototypes: Float[Tensor, "classes dim"], labels: Int[Tensor, " batch"]
) -> Int[Tensor, " classes"]:
    """Class ids by descending relevance to the batch: the highest cosine to any image, own labels first.

    Args:
        image_features: Current image features, unit-norm, float32.
        prototypes: Text features of the initial model, unit-norm, float32.
        labels: Right class of each image.
    """
    similarity = image_features @ prototypes.T
    similarity = similarity.scatter(1, labels[:, None], 1e4)  # the official constant; above every cosine
    return similarity.max(dim=0).values.argsort(descending=True)


def selected_classes(
    ranked: Int[Tensor, " classes"], keep_rank: Bool[Tensor, " classes"], labels: Int[Tensor, " batch"]
) -> Int[Tensor, " selected"]:
    """Ids of the selected classes, ascending.

    Args:
        ranked: Class ids by rank.
        keep_rank: Which ranks stay.
        labels: Right class of each image; always selected.

    Deviation: The official code drops a label that lies beyond the selected ranks (more distinct labels in a batch
        than top ranks) and then trains that image towards class 0.
    """
    keep = torch.zeros_like(keep_rank)
    keep[ranked] = keep_rank  # from ranks to class ids
    keep[labels] = True
    return keep.nonzero().squeeze(1)


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
    check_choice("reduction", reduction, REDUCTIONS)
    student = nn.functional.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = nn.functional.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    # The target as logarithms too, so that no probability is rounded before its logarithm is taken.
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
    check_choice("weighting", weighting, TEACHER_WEIGHTINGS)
    if weighting == "equal":
        return logits.float().mean(dim=0)
    confidence = logits.float().softmax(dim=-1).amax(dim=-1, keepdim=True)  # (teachers, batch, 1)
    return (logits.float() * confidence / confidence.sum(dim=0)).sum(dim=0)


def feature_consistency(
    prompted: Float[Tensor, "tokens width"], clean: Float[Tensor, "tokens width"]
) -> Float[Tensor, ""]:
    """Mean Euclidean distance of visual tokens, in float32; minimised, with a weight that is the objective's.

    Formula: (1 / n) * sum_j ||f_j - f'_j||_2 over the n visual tokens of all images of the batch, the norm over the
        width. Not squared, so it is independent of the width's scale only up to that of the features. Where both are
        equal (an untrained prompt) loss and gradient are 0.

    Args:
        prompted: Visual tokens as they enter the language model, from images with the prompt.
        clean: The same tokens from the same (shrunken) images without it; they receive no gradient.
    """
    difference = prompted.float() - clean.detach().float()
    return torch.linalg.vector_norm(difference, dim=-1).mean()  # its gradient at 0 is 0, where a square root's is NaN


def feature_distance(
    features: Float[Tensor, "batch dim"], frozen_features: Float[Tensor, "rows dim"]
) -> Float[Tensor, ""]:
    """Mean absolute difference of unit-norm features, over images or classes and dimensions, in float32 (Eq. 3).

    Args:
        features: Of the prompted model; normalised here.
        frozen_features: Of the frozen model, same rows; normalised here.
    """
    features = nn.functional.normalize(features.float(), dim=-1)
    return nn.functional.l1_loss(features, nn.functional.normalize(frozen_features.float(), dim=-1))


def semantic_enhancement(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean CLIP logit of the right class, in float32; maximised, so the objective subtracts it with its weight.

    Formula: (1 / batch) * sum_i exp(s) * cos(I(x_i), T(y_i)); there is no softmax over the classes.

    Args:
        logits: Cosines of image and class features, multiplied by the logit scale (about 100 for a trained CLIP, so a
            weight of 0.001 is 0.1 on the cosine).
        labels: Right class of each image.
    """
    return logits.float().gather(1, labels[:, None]).mean()


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
    check_choice("soft_form", form, FORMS)
    divergence = distillation_loss(student_logits, teacher_logits, temperature=temperature)
    if form == "kl":
        return divergence
    log_teacher = (teacher_logits.detach().float() / temperature).log_softmax(dim=-1)
    # A constant for the student; it makes the value the cross-entropy that other codes report.
    entropy = -(log_teacher.exp() * log_teacher).sum(dim=-1).mean()
    return divergence + temperature**2 * entropy
