"""The report's statistics."""

import statistics

import numpy as np
import pytest
import scipy.stats

from figures import common
from figures.common import mean_sd


def test_means_and_standard_deviations():
    assert [mean_sd([0.1, 0.3]), mean_sd([0.5]), mean_sd([])] == ["0.200 ± 0.141", "0.500", "–"]


def test_the_spread_is_pooled_over_groups_of_unlike_means():
    """Variances 2 (of two runs) and 4 (of three): (1 * 2 + 2 * 4) / 3."""
    spread = common.pooled_spread([[1, 3], [10, 12, 14], [7], []])
    assert spread == pytest.approx((10 / 3, 3))
    assert common.pooled_spread([[7]]).df == 0


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize("n_images", [None, 500], ids=["same items", "other items"])
def test_prediction_intervals_hold_95_percent_of_new_runs(n_seeds, n_images):
    """Six systems of unlike accuracy, seeds with a standard deviation of two points; a new run is
    scored on the same images as the others, or on images of its own."""
    random, accuracies, inside = np.random.default_rng(0), np.linspace(0.6, 0.9, 6), []

    def score(accuracy, size):
        seed = random.normal(accuracy, 0.02, size)
        if n_images is None:
            return seed
        # each system's runs share their images: one error for all of them
        return seed + random.normal(0, np.sqrt(accuracy * (1 - accuracy) / n_images))

    for _ in range(1500):
        groups = [score(accuracy, n_seeds) for accuracy in accuracies]
        spread = common.pooled_spread(group.tolist() for group in groups)
        for accuracy, group in zip(accuracies, groups):
            mean = statistics.mean(group)
            items = 2 * mean * (1 - mean) / n_images if n_images else 0.0
            low, high = common.prediction_interval(group.tolist(), spread, items)
            inside.append(low <= score(accuracy, None) <= high)
    assert 0.93 <= np.mean(inside) <= 0.97


def test_no_interval_without_a_spread():
    assert common.prediction_interval([0.5], common.pooled_spread([[0.5]])) is None
    assert common.prediction_interval([], common.Spread(0.1, 3)) is None


def test_differences_are_paired_by_seed():
    values, baseline = {42: 0.80, 1: 0.83, 2: 0.82, 3: 0.9}, {2: 0.74, 1: 0.73, 42: 0.71}
    paired = scipy.stats.ttest_rel([0.80, 0.83, 0.82], [0.71, 0.73, 0.74])
    low, high = paired.confidence_interval()
    assert common.difference(values, baseline) == f"+0.090 [{low:+.3f}, {high:+.3f}]"
    assert common.difference({42: 0.5}, {42: 0.6, 1: 0.7}) == "-0.100"
    assert common.difference({42: 0.5}, {1: 0.7}) == common.difference({}, {1: 0.7}) == "–"


def test_unpaired_differences_are_those_of_students_test():
    values, baseline = [0.80, 0.83, 0.82, 0.9], [0.71, 0.73, 0.74]
    low, high = scipy.stats.ttest_ind(values, baseline).confidence_interval()
    spread = common.pooled_spread([values, baseline])
    mean = statistics.mean(values) - statistics.mean(baseline)
    expected = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    assert common.unpaired_difference(values, baseline, spread) == expected
    assert common.unpaired_difference(values, [], spread) == "–"
