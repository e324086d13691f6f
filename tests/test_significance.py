"""Paired differences: the t-test against SciPy's, Holm's correction against examples worked by hand, and odd cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from racecar.demo.results import Results, Run
from racecar.demo.significance import differences
from racecar.experiments.significance import holm, t_test


def results_of(**accuracies: dict[int, float | None]) -> Results:
    """Results of A→B from model -> seed -> last accuracy, None for a run without labels."""
    results = Results(models={name: name for name in accuracies}, data={}, settings={}, versions={})
    for name, by_seed in accuracies.items():
        for seed, accuracy in by_seed.items():
            curve = [] if accuracy is None else [0.1, accuracy]
            results.runs.append(Run(name, seed, "A→B", [], [], {}, curve, 1.0))
    return results


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("shift", [0.0, 0.02, -0.3])
def test_t_test_agrees_with_scipy(count, shift):
    rng = np.random.default_rng(count)
    ours = rng.normal(0.9, 0.01, count)
    theirs = ours + shift + rng.normal(0, 0.01, count)
    expected = ttest_rel(theirs, ours)
    interval = expected.confidence_interval(0.95)
    found = t_test((theirs - ours).tolist())
    assert found == pytest.approx(((theirs - ours).mean(), interval.low, interval.high, expected.pvalue), rel=1e-9)


@pytest.mark.parametrize(
    ("values", "p"),
    [([0.02] * 2, 0.5), ([-0.02] * 3, 0.25), ([0.92 - 0.9, 0.93 - 0.91], 0.5), ([0.0] * 5, 1.0), ([0.02] * 5, 0.0625)],
)
def test_a_few_seeds_that_say_the_same_prove_nothing(values, p):
    mean, low, high, found = t_test(values)
    assert mean == pytest.approx(values[0])
    assert (low, high) == (-math.inf, math.inf)
    assert found == p


def test_many_seeds_that_say_the_same_prove_something():
    assert t_test([0.02] * 8) == (0.02, 0.02, 0.02, 2 / 256)  # eight coins that all fall alike
    assert t_test([0.0] * 8) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ({}, {}),
        ({"a": 0.03}, {"a": 0.03}),
        # .005·4, .01·3, .03·2, and .04·1 = .04, which may not lie below its forerunner
        ({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}),
        ({"a": 0.5, "b": 0.9, "c": 0.4}, {"a": 1.0, "b": 1.0, "c": 1.0}),
        ({"a": 0.02, "b": 0.02, "c": 0.02}, {"a": 0.06, "b": 0.06, "c": 0.06}),
        ({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}),
    ],
)
def test_holm(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_differences_are_to_the_first_model_and_corrected_for_all_others():
    rng = np.random.default_rng(0)
    table = {name: dict(enumerate(rng.normal(mean, 0.01, 5))) for name, mean in (("Std", 0.9), ("a", 0.95), ("b", 0.9))}
    found = differences(results_of(**table), "A→B")
    expected = {n: ttest_rel(list(table[n].values()), list(table["Std"].values())).pvalue for n in ("a", "b")}
    assert {name: d.p for name, d in found.items()} == pytest.approx(expected)
    assert {name: d.adjusted for name, d in found.items()} == pytest.approx(holm(expected))
    assert found["a"].mean == pytest.approx(0.05, abs=0.02) and found["a"].low < found["a"].mean < found["a"].high
    assert (found["a"].clear, found["b"].clear) == (True, False)


def test_only_common_seeds_are_compared():
    results = results_of(Std={0: 0.9, 1: 0.91, 2: 0.95}, a={2: 0.96, 1: 0.93, 7: 0.5})
    assert differences(results, "A→B")["a"].mean == pytest.approx(0.015)


def test_nothing_is_said_without_two_pairs():
    assert differences(results_of(Std={0: 0.9}, a={0: 0.95}), "A→B") == {}
    assert differences(results_of(Std={0: 0.9, 1: 0.9}, a={1: 0.95, 2: 0.95}), "A→B") == {}
    assert differences(results_of(Std={0: 0.9, 1: 0.9}), "A→B") == {}
    assert differences(results_of(Std={0: 0.9, 1: 0.9}, a={0: 0.95, 1: 0.96}), "I") == {}


def test_a_model_without_accuracy_is_left_out_and_not_counted():
    unlabelled = {0: None, 1: None, 2: None}
    std, a = {0: 0.9, 1: 0.91, 2: 0.92}, {0: 0.92, 1: 0.935, 2: 0.94}
    found = differences(results_of(Std=std, Pre=unlabelled, a=a), "A→B")
    assert list(found) == ["a"] and found["a"].adjusted == found["a"].p
    assert differences(results_of(Pre=unlabelled, a=a), "A→B") == {}
