"""Harmonic mean of base and new accuracy as a module of the `evaluate` library."""

import statistics

import datasets
import evaluate

from peft_vlm.evaluation import metrics


class HarmonicMean(evaluate.Metric):
    """Harmonic mean of the average base and the average new accuracy: `compute(base=[...],
    new=[...])["harmonic_mean"]`.

    The lists hold one value per seed or dataset; they are averaged first, as papers do.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"base": datasets.Value("float64"), "new": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description="Harmonic mean of the average base and the average new accuracy.",
            citation="",
            inputs_description="base and new: accuracies in one unit, one per seed or dataset.",
            features=datasets.Features(features),
        )

    def _compute(self, base: list[float], new: list[float]) -> dict[str, float]:
        return {"harmonic_mean": metrics.harmonic_mean(statistics.fmean(base), statistics.fmean(new))}
