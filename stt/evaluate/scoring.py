"""Metrics of classifiers by name, from scikit-learn and scipy."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy
from scipy import stats
from sklearn import metrics

Values = Sequence[int | float]


def _correlation(measure: Callable[[Values, Values], object], labels: Values, predictions: Values) -> float:
    """0 where one side is constant, as Matthews' correlation has it there."""
    if numpy.ptp(labels) == 0 or numpy.ptp(predictions) == 0:
        return 0.0
    return float(measure(labels, predictions).statistic)


METRICS: Mapping[str, Callable[[Values, Values], float]] = {
    "accuracy": lambda labels, predictions: float(metrics.accuracy_score(labels, predictions)),
    "f1": lambda labels, predictions: float(metrics.f1_score(labels, predictions, zero_division=0)),
    "macro_f1": lambda labels, predictions: float(metrics.f1_score(labels, predictions, average="macro",
                                                                   zero_division=0)),
    "matthews": lambda labels, predictions: float(metrics.matthews_corrcoef(labels, predictions)),
    "pearson": lambda labels, predictions: _correlation(stats.pearsonr, labels, predictions),
    "spearman": lambda labels, predictions: _correlation(stats.spearmanr, labels, predictions),
}


def by_class(labels: Values, predictions: Values, names: Sequence[str]) -> list[dict[str, object]]:
    """Precision, recall, F1 and number of examples of every class."""
    found = metrics.precision_recall_fscore_support(labels, predictions, labels=range(len(names)), zero_division=0)
    return [{"name": name, "precision": float(precision), "recall": float(recall), "f1": float(f1), "examples": int(n)}
            for name, precision, recall, f1, n in zip(names, *found, strict=True)]


def confusion(labels: Values, predictions: Values, n_classes: int) -> list[list[int]]:
    """Rows are the true classes, columns the predicted ones."""
    return metrics.confusion_matrix(labels, predictions, labels=range(n_classes)).tolist()
