"""The Fréchet distance, what it means for digits, and the figures of a report."""

import numpy as np
import pytest

from pixelgen.data import Digits
from pixelgen.evaluation.metrics import (
    evaluate_digits,
    frechet_distance,
    to_digit_levels,
    within_class_variance_ratio,
)


@pytest.fixture(scope="module")
def digits():
    data = Digits()
    return data.images, data.labels


def _class_means(images, labels):
    means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
    return np.round(means).astype(np.uint8)[labels]


# --- Frechet distance


def test_frechet_of_known_gaussians():
    # 2 D points at +-a along each axis have variance 2 a^2 / (2 D - 1) there and no covariance.
    def points(mean, variances):
        width = len(variances)
        axes = np.diag(np.sqrt(np.array(variances) * (2 * width - 1) / 2))
        return np.concatenate([axes, -axes]) + mean

    got = frechet_distance(points([0, 0, 0], [1, 4, 9]), points([1, 2, 3], [4, 4, 1]))
    assert got == pytest.approx(14 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_frechet_equals_the_matrix_square_root():
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 12)) @ generator.normal(size=(12, 12))
    y = generator.normal(size=(200, 12)) @ generator.normal(size=(12, 12)) + 0.5
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_a_distance():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 5)), generator.normal(size=(40, 5)) * 2 + 1
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))
    assert frechet_distance(x, x[::-1] + 3) == pytest.approx(45)


def test_frechet_of_singular_covariances():
    generator = np.random.default_rng(0)
    x = np.zeros((10, 64))  # fewer points than dimensions, most of them constant
    x[:, :3] = generator.normal(size=(10, 3)) * 1e3
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-2)
    constant = np.ones((10, 64))
    assert frechet_distance(constant, constant) == 0
    expected = ((x.mean(0) - 1) ** 2).sum() + x.var(axis=0, ddof=1).sum()
    assert frechet_distance(x, constant) == pytest.approx(expected)


# --- digits: figures that tell what a distance means


def test_frechet_distances_of_the_digits(digits):
    images, labels = digits

    def pixel_frechet(some, others):
        return frechet_distance(to_digit_levels(some), to_digit_levels(others))

    assert pixel_frechet(_class_means(images, labels), images) == pytest.approx(451, abs=1)
    halves = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(images))
        halves.append(pixel_frechet(images[order[::2]], images[order[1::2]]))
        drawn = generator.integers(0, len(images), len(images))
        assert 3.5 < pixel_frechet(images[drawn], images) < 6.5
    assert 17 < np.mean(halves) < 21
    assert all(15 < distance < 25 for distance in halves)


def test_report_of_the_real_digits(digits):
    report = evaluate_digits(*digits)
    assert report["num_samples"] == 1797
    assert report["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert report["variance_ratio"] == pytest.approx(1)
    assert report["svc_agreement"] > 0.998


def test_report_of_class_means_wrong_labels_and_noise(digits):
    images, labels = digits
    report = evaluate_digits(_class_means(images, labels), labels)
    assert report["svc_agreement"] == 1  # accuracy does not see it
    assert report["variance_ratio"] == pytest.approx(0, abs=1e-9)
    assert report["frechet_distance"] > 400
    assert evaluate_digits(images, (labels + 1) % 10)["svc_agreement"] < 0.01
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    report = evaluate_digits(noise, labels)
    assert report["svc_agreement"] < 0.3
    assert report["variance_ratio"] > 1.5
    assert report["frechet_distance"] > 1000


def test_levels_are_the_data_sets_own(digits):
    from sklearn.datasets import load_digits

    levels = to_digit_levels(digits[0])
    expected = load_digits(return_X_y=True)[0]
    assert np.abs(levels - expected).max() < 0.04  # 128 is the byte of level 8: 8.03
    np.testing.assert_array_equal(np.round(levels), expected)


# --- variance


def test_variance_ratio_weighs_classes_equally():
    real, real_labels = np.array([[-1.0], [1.0], [9.0], [11.0]]), np.array([0, 0, 1, 1])
    samples = np.array([[-2.0], [2.0], [9.0], [10.0], [11.0]])
    ratio = within_class_variance_ratio(samples, [0, 0, 1, 1, 1], real, real_labels)
    assert ratio == pytest.approx(((8 + 1) / 2) / ((2 + 2) / 2))  # unbiased variances, classes weigh the same
    only_first = within_class_variance_ratio(samples[:2], [0, 0], real, real_labels)
    assert only_first == pytest.approx(4)
