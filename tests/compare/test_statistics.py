"""The statistics against enumerations, published examples and simulations."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from clipdistill.compare.combine import claim
from clipdistill.compare.statistics import (
    Comparison,
    best_p,
    compare_pair,
    detectable_over_images,
    detectable_over_seeds,
    holm,
    seeds_needed,
)


def predictions(generator, seeds, images, accuracy):
    return generator.random((seeds, images)) < accuracy


def test_the_test_over_seeds_is_the_enumeration_of_all_signs():
    generator = np.random.default_rng(3)
    one, other = predictions(generator, 7, 40, 0.7), predictions(generator, 7, 40, 0.6)
    found = compare_pair(one, other)
    differences = one.mean(1) - other.mean(1)
    means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert found.p_seeds == pytest.approx(expected)
    assert found.difference == pytest.approx(differences.mean())
    assert found.low < found.difference < found.high


def test_six_seeds_of_one_sign_give_the_best_p_value():
    one, other = np.zeros((6, 100), bool), np.zeros((6, 100), bool)
    for seed in range(6):
        one[seed, : 60 + seed] = True
        other[seed, : 50 + seed // 2] = True
    found = compare_pair(one, other)
    assert found.p_seeds == pytest.approx(2 / 64) == best_p(6)
    assert found.low > 0


def test_the_test_over_images_is_mcnemars_exact_one():
    """One pair of models: 10 discordant images, 9 of them in favour: 2 * (C(10, 9) + C(10, 10)) / 2^10."""
    one, other = np.zeros((2, 50), bool), np.zeros((2, 50), bool)
    one[:, :30] = True
    other[:, :21] = True
    other[:, 40] = True
    found = compare_pair(one, other)
    assert (found.better, found.worse) == (9, 1)
    assert found.p_images == pytest.approx(2 * (10 + 1) / 2**10)


def test_equal_arms_differ_in_nothing():
    one = predictions(np.random.default_rng(0), 6, 30, 0.5)
    found = compare_pair(one, one.copy())
    assert (found.difference, found.low, found.high, found.p_seeds, found.p_images) == (0, 0, 0, 1, 1)
    assert not found.is_shown


def test_a_claim_names_the_better_arm_first_and_turns_the_interval_with_it():
    pair = Comparison(
        difference=-0.02, low=-0.03, high=-0.01, p_seeds=0.03, p_images=0.01, better=3, worse=30, adjusted=0.03
    )
    assert claim("a", "b", pair).startswith("b beats a by 2.00 points [+1.00, +3.00]; p = 0.030 over seeds")
    unsure = replace(pair, high=0.01)
    assert claim("a", "b", unsure).startswith("no difference between a and b is shown: b is 2.00 points [-1.00, +3.00]")


def test_holm_is_the_published_procedure():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize("comparisons", [1, 2, 8])
def test_the_number_of_seeds_needed_is_the_first_that_can_reach_the_level(comparisons):
    needed = seeds_needed(comparisons)
    assert best_p(needed, comparisons) <= 0.05 < best_p(needed - 1, comparisons)


def test_without_a_difference_few_comparisons_claim_one():
    """Of 300 comparisons of equal arms, at most about 5 % may claim a difference."""
    generator = np.random.default_rng(5)
    claims = 0
    for _ in range(300):
        images_N = generator.random(200)
        one, other = (generator.random((6, 200)) < images_N for _ in range(2))
        found = compare_pair(one, other)
        claims += max(found.p_seeds, found.p_images) <= 0.05
    assert claims <= 20


def test_a_detectable_difference_is_detected_four_times_of_five():
    generator = np.random.default_rng(7)
    spread, seeds = 0.01, 8
    size = detectable_over_seeds(generator.normal(0, spread, 4000), seeds=seeds)
    draws = generator.normal(size, spread, (4000, seeds))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(seeds))
    assert np.mean(np.abs(t) > 2.3646) == pytest.approx(0.8, abs=0.03)  # t of 7 degrees, two-sided 5 %
    images, discordant = 2000, 0.2
    size = detectable_over_images(images, discordant=discordant)
    shares = [(discordant + size) / 2, (discordant - size) / 2, 1 - discordant]
    counts = generator.multinomial(images, shares, 4000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(counts[:, 0] + counts[:, 1])
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"allowed: equal \(S, N\)"):
        compare_pair(np.zeros((3, 4), bool), np.zeros((3, 5), bool))
    with pytest.raises(ValueError, match="S of 2 or more"):
        compare_pair(np.zeros((1, 4), bool), np.zeros((1, 4), bool))
