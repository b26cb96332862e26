"""Metrics, protocols and reports."""

from peft_vlm.evaluation.classify import (
    EvalResult,
    ImageClassifier,
    Predictions,
    TextClassifier,
    classify,
    cosine_logits,
    evaluate_classifier,
    predict_logits,
)
from peft_vlm.evaluation.metrics import (
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    harmonic_mean,
    per_class_accuracy,
)
from peft_vlm.evaluation.plots import bars_png, confusion_matrix_png
from peft_vlm.evaluation.protocols import (
    ProtocolResult,
    base_to_new,
    cross_dataset,
    domain_shift,
    few_shot,
    zero_shot,
)
from peft_vlm.evaluation.report import EvalReport, PairedDifference, Summary, paired_difference, summarize

__all__ = [
    "EvalReport",
    "EvalResult",
    "ImageClassifier",
    "PairedDifference",
    "Predictions",
    "ProtocolResult",
    "Summary",
    "TextClassifier",
    "accuracy",
    "bars_png",
    "base_to_new",
    "classify",
    "confusion_matrix",
    "confusion_matrix_png",
    "cosine_logits",
    "cross_dataset",
    "domain_shift",
    "evaluate_classifier",
    "expected_calibration_error",
    "few_shot",
    "harmonic_mean",
    "paired_difference",
    "per_class_accuracy",
    "predict_logits",
    "summarize",
    "zero_shot",
]
