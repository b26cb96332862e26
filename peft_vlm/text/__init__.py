"""Templates, class prompts as token ids, and the features of a class list."""

from peft_vlm.text.candidates import Candidates, candidate_scores, tokenize_candidates
from peft_vlm.text.class_features import ClassFeatureCache, encode_classes, evaluation_mode
from peft_vlm.text.prompts import ClassPrompts, check_class_names, tokenize_classes, tokenize_for_model
from peft_vlm.text.reserve import reserve_slots, slots_of
from peft_vlm.text.templates import IMAGENET_ENSEMBLE, check_template, fill

__all__ = [
    "IMAGENET_ENSEMBLE",
    "Candidates",
    "ClassFeatureCache",
    "ClassPrompts",
    "candidate_scores",
    "check_class_names",
    "check_template",
    "encode_classes",
    "evaluation_mode",
    "fill",
    "reserve_slots",
    "slots_of",
    "tokenize_candidates",
    "tokenize_classes",
    "tokenize_for_model",
]
