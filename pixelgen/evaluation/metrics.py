"""How good and how varied samples are: Frechet distance, within-class variance, agreement of a classifier.

A classifier alone is a weak judge of digits: class means satisfy it. The Frechet distance and the variance
ratio see the collapse.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from pixelgen.data.sources.digits import MAX_LEVEL, NATIVE_SIZE, Digits
from pixelgen.errors import UserError


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features (Heusel et al., 1706.08500).

    ``|mean_x - mean_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x^1/2 C_y C_x^1/2)^1/2)``, in float64. The last trace
    sums the roots of the eigenvalues of a symmetric matrix, so singular covariances need no special case.

    Args:
        x: (N, D) features, N at least 2.
        y: (M, D) features, M at least 2.

    Returns:
        The squared distance, at least 0.

    Raises:
        ValueError: shapes do not fit or a value is not finite.
    """
    first, second = _features(x, "x"), _features(y, "y")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"frechet_distance: x and y must have the same width, got {first.shape[1]} and {second.shape[1]}"
        )
    offset = first.mean(axis=0) - second.mean(axis=0)
    cov_x, cov_y = np.atleast_2d(np.cov(first, rowvar=False)), np.atleast_2d(np.cov(second, rowvar=False))
    values, vectors = np.linalg.eigh(cov_x)
    root_x = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root_x @ cov_y @ root_x
    overlap = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    return max(0.0, float(offset @ offset + np.trace(cov_x) + np.trace(cov_y) - 2 * overlap))


def _features(values: ArrayLike, name: str) -> np.ndarray:
    features = np.asarray(values, dtype=np.float64)
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(f"frechet_distance: {name} must have shape (N >= 2, D >= 1), got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError(f"frechet_distance: {name} must be finite, got NaN or infinity")
    return features


def to_digit_levels(images: ArrayLike) -> np.ndarray:
    """Converts digit images to the 64 pixels and the scale 0..16 of the data set: ``u * 16 / 255``.

    Three channels are averaged to one, and larger images to 8x8. Nothing is rounded beyond uint8 (rounding to
    whole levels as well moves a Frechet distance of 2 by 0.5 and one of 10 by 1).

    Args:
        images: uint8 (N, S, S), (N, S, S, C) or (N, C, S, S) with C 1 or 3 and S a multiple of 8.

    Returns:
        (N, 64) float64.

    Raises:
        UserError: for another dtype or shape.
    """
    pixels = np.asarray(images)
    shape = pixels.shape
    if pixels.dtype != np.uint8:
        raise UserError(f"digits: images must be uint8, got {pixels.dtype}")
    if pixels.ndim == 4 and shape[3] in (1, 3) and shape[1] == shape[2]:
        pixels = pixels.mean(axis=3)
    elif pixels.ndim == 4 and shape[1] in (1, 3) and shape[2] == shape[3]:
        pixels = pixels.mean(axis=1)
    size = pixels.shape[-1] if pixels.ndim == 3 else 0
    if size == 0 or pixels.shape[1] != size or size % NATIVE_SIZE:
        raise UserError(
            f"digits: images must be square with 1 or 3 channels and a side of {NATIVE_SIZE} * k, got {shape}"
        )
    block = size // NATIVE_SIZE
    pixels = pixels.reshape(len(pixels), NATIVE_SIZE, block, NATIVE_SIZE, block).mean(axis=(2, 4))
    return pixels.reshape(len(pixels), NATIVE_SIZE**2) * (MAX_LEVEL / 255)


def within_class_variance_ratio(
    samples: ArrayLike, labels: ArrayLike, real: ArrayLike, real_labels: ArrayLike
) -> float:
    """Variety of the samples of a class relative to the real ones: 1 is right, 0 is one picture per class.

    ``mean_c tr(Cov(samples of c)) / mean_c tr(Cov(real images of c))`` over the classes c in ``labels``.

    Args:
        samples: (N, ...) numbers, flattened to features; two or more of every class in ``labels``.
        labels: (N,) integers.
        real: (M, ...) numbers on the same scale.
        real_labels: (M,) integers.

    Returns:
        The ratio.

    Raises:
        ValueError: lengths differ, a class has fewer than two samples or real images, or those do not vary.
    """
    variance = _within_class_variance(samples, labels, np.unique(np.asarray(labels)), "samples")
    base = _within_class_variance(real, real_labels, np.unique(np.asarray(labels)), "real")
    if base == 0:
        raise ValueError("within_class_variance_ratio: real images must vary within a class, got variance 0")
    return variance / base


def _within_class_variance(values: ArrayLike, labels: ArrayLike, classes: np.ndarray, name: str) -> float:
    label = np.asarray(labels)
    features = np.asarray(values, dtype=np.float64)
    if label.ndim != 1 or len(features) != len(label) or len(label) == 0:
        raise ValueError(
            f"within_class_variance_ratio: {name} must have one label each, "
            f"got {features.shape[:1]} and labels {label.shape}"
        )
    features = features.reshape(len(features), -1)
    variances = []
    for kind in classes:
        members = features[label == kind]
        if len(members) < 2:
            raise ValueError(
                f"within_class_variance_ratio: {name} must hold 2 or more of class {kind}, got {len(members)}"
            )
        variances.append(members.var(axis=0, ddof=1).sum())
    return float(np.mean(variances))


def svc_agreement(samples: ArrayLike, labels: ArrayLike) -> float:
    """Share of digit samples that a classifier trained on the real digits gives their own label.

    The classifier is scikit-learn's ``SVC(gamma=0.001)`` on the 64 raw pixels, 0..16 scale, fitted to all.

    Args:
        samples: uint8 images as ``to_digit_levels`` takes them, at least one.
        labels: (N,) integers 0..9.

    Returns:
        The share, 0 to 1.

    Raises:
        UserError: wrong shape or dtype, or not one label per sample.
    """
    levels, label = to_digit_levels(samples), np.asarray(labels)
    if label.shape != (len(levels),) or len(levels) == 0:
        raise UserError(
            f"svc_agreement: need one label per sample, got {label.shape} labels for {len(levels)}"
        )
    return float(np.mean(_digit_classifier().predict(levels) == label))


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
    svc_agreement: float  # share of labels that the classifier confirms


def evaluate_digits(samples: ArrayLike, labels: ArrayLike) -> DigitsReport:
    """Compares digit samples with the 1,797 real digits.

    Args:
        samples: uint8 images as ``to_digit_levels`` takes them; two or more of every class in ``labels``. One
            for each real label (``Digits().labels``) makes the Frechet distance a fair one.
        labels: (N,) integers 0..9.

    Returns:
        ``num_samples``, ``frechet_distance`` on the 64 raw pixels, 0..16 scale, ``svc_agreement`` and
        ``variance_ratio`` (``within_class_variance_ratio``).

    Raises:
        UserError: samples or labels do not have that form.
    """
    levels, label = to_digit_levels(samples), np.asarray(labels)
    if label.shape != (len(levels),):
        raise UserError(
            f"evaluate_digits: need one label per sample, got {label.shape} labels for {len(levels)}"
        )
    if not np.issubdtype(label.dtype, np.integer) or not np.isin(label, np.arange(10)).all():
        raise UserError(
            f"evaluate_digits: labels must be integers 0 to 9, got {label.dtype} {np.unique(label)}"
        )
    kinds, counts = np.unique(label, return_counts=True)
    if len(label) == 0 or counts.min() < 2:
        got = f"{counts.min()} of {kinds[counts.argmin()]}" if len(label) else "none"
        raise UserError(f"evaluate_digits: need at least 2 samples of every class in labels, got {got}")
    # At the size of the samples, so that both go through the same averaging.
    real = Digits(image_size=int(np.shape(samples)[2]))  # rows or columns: the images are square
    real_levels = to_digit_levels(real.images)
    return {
        "num_samples": len(levels),
        "frechet_distance": frechet_distance(levels, real_levels),
        "variance_ratio": within_class_variance_ratio(levels, label, real_levels, real.labels),
        "svc_agreement": svc_agreement(samples, label),
    }
