"""How good and how varied samples are: Frechet distance, within-class variance, agreement of a classifier.

A classifier alone is a weak judge of digits: class means satisfy it. The Frechet distance and the variance
ratio see the collapse.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypedDict

import numpy as np

from pixelgen.data.sources.digits import MAX_LEVEL, Digits


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features (Heusel et al., 1706.08500).

    ``|mean_x - mean_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x^1/2 C_y C_x^1/2)^1/2)``. The last trace sums the
    roots of the eigenvalues of a symmetric matrix, so singular covariances need no special case.

    Args:
        x: (N, D) float64 features, N at least 2.
        y: (M, D) float64 features, M at least 2.
    """
    offset = x.mean(axis=0) - y.mean(axis=0)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(cov_x)
    root_x = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root_x @ cov_y @ root_x
    overlap = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    return max(0.0, float(offset @ offset + np.trace(cov_x) + np.trace(cov_y) - 2 * overlap))


def to_digit_levels(images: np.ndarray) -> np.ndarray:
    """Digits (N, 1, 8, 8) uint8 as (N, 64) float64 on the scale 0..16 of the data set: ``u * 16 / 255``.

    Not rounded: whole levels would move a Frechet distance of 2 by 0.5 and one of 10 by 1.
    """
    return images.reshape(len(images), -1) * (MAX_LEVEL / 255)


def within_class_variance_ratio(
    samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray
) -> float:
    """Variety of the samples of a class relative to the real ones: 1 is right, 0 is one picture per class.

    ``mean_c tr(Cov(samples of c)) / mean_c tr(Cov(real images of c))`` over the classes c in ``labels``.

    Args:
        samples: (N, D) features; two or more of every class in ``labels``.
        labels: (N,) integers.
        real: (M, D) features on the same scale.
        real_labels: (M,) integers.
    """

    def variance(features: np.ndarray, kinds: np.ndarray) -> float:
        return float(np.mean([features[kinds == c].var(axis=0, ddof=1).sum() for c in np.unique(labels)]))

    return variance(samples, labels) / variance(real, real_labels)


@lru_cache(maxsize=1)
def _digit_classifier() -> Any:
    from sklearn.svm import SVC

    real = Digits()
    # Rounded, the levels are the data set's own again.
    return SVC(gamma=0.001).fit(np.round(to_digit_levels(real.images)), real.labels)


class DigitsReport(TypedDict):
    """What ``evaluate_digits`` returns."""

    num_samples: int
    frechet_distance: float  # to all real ones: a bootstrap of them has 5, one half 15 to 25, class means 451
    variance_ratio: float  # within a class, relative to the real digits
    svc_agreement: float  # share of labels that a classifier trained on the real digits confirms


def evaluate_digits(samples: np.ndarray, labels: np.ndarray) -> DigitsReport:
    """Compares digit samples with the 1,797 real digits, on the 64 raw pixels, 0..16 scale.

    Args:
        samples: (N, 1, 8, 8) uint8. One for each real label (``Digits().labels``) makes the Frechet distance
            a fair one.
        labels: (N,) integers 0..9, each at least twice.
    """
    levels, real = to_digit_levels(samples), Digits()
    real_levels = to_digit_levels(real.images)
    return {
        "num_samples": len(levels),
        "frechet_distance": frechet_distance(levels, real_levels),
        "variance_ratio": within_class_variance_ratio(levels, labels, real_levels, real.labels),
        "svc_agreement": float(np.mean(_digit_classifier().predict(levels) == labels)),
    }
