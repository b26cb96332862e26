"""Templates, class prompts as token ids, and the features of a class list."""

from peft_vlm.text.answers import Candidates, candidate_scores, tokenize_candidates
from peft_vlm.text.class_features import ClassFeatureCache, conditioned_logits, encode_classes, evaluation_mode
from peft_vlm.text.prompts import (
    IMAGENET_ENSEMBLE,
    ClassPrompts,
    check_class_names,
    check_template,
    fill,
    reserve_slots,
    slots_of,
    tokenize_classes,
    tokenize_for_model,
)

__all__ = [
    "IMAGENET_ENSEMBLE",
    "Candidates",
    "ClassFeatureCache",
    "ClassPrompts",
    "candidate_scores",
    "check_class_names",
    "check_template",
    "conditioned_logits",
    "encode_classes",
    "evaluation_mode",
    "fill",
    "reserve_slots",
    "slots_of",
    "tokenize_candidates",
    "tokenize_classes",
    "tokenize_for_model",
]
