"""Scores that can be resampled: one record per sample, and an aggregate over records.

Keeping records is what lets every later comparison be paired sample by sample.
"""

from trimpoint.score.base import Records, Score, SumScore, Weights, main_output
from trimpoint.score.classification import F1, Accuracy, Precision, Recall, RocAuc
from trimpoint.score.regression import MeanAbsoluteError, MeanSquaredError
from trimpoint.score.sequence import EntityF1, Perplexity

__all__ = [
    "F1",
    "Accuracy",
    "EntityF1",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Perplexity",
    "Precision",
    "Recall",
    "Records",
    "RocAuc",
    "Score",
    "SumScore",
    "Weights",
    "main_output",
]
