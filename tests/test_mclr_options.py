"""MCLR's options: what they need, which are refused, and the advice when training diverges."""

import re

import pytest

from mclr_jax.objectives.mclr import MCLR


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, {"posterior"}),
        ({"negatives": "prior"}, set()),
        ({"negatives": "mismatched", "bound": "clip"}, set()),
        ({"negatives": "prior", "weighting": "cfg"}, {"posterior"}),
        ({"negatives": "prior", "target": "reference"}, {"reference"}),
        ({"target": "reference"}, {"posterior", "reference"}),
    ],
)
def test_it_needs_a_posterior_and_a_reference_where_it_reads_them(options, needs):
    assert MCLR(**options).needs == needs | {"class_prior", "class_strengths"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": "wrong"}, "negatives is 'wrong'. (Did .*)?Known: .*mismatched"),
        ({"weighting": "cfg"}, "CFG-equivalent form already"),
        ({"weighting": "all"}, "weighting is 'all'. (Did .*)?Known: .*cfg"),
        ({"bound": "tight"}, "bound is 'tight'. (Did .*)?Known: .*clip"),
        ({"target": "truth"}, "target is 'truth'. (Did .*)?Known: .*reference"),
        ({"beta": -0.5}, "beta is -0.5; expected a number of at least 0"),
        ({"clip_ratio": float("nan")}, "clip_ratio is nan; expected a number"),
        ({"sigma_interval": (2.0, 1.0)}, r"sigma_interval is \(2.0, 1.0\); .*low < high"),
        ({"sigma_interval": (2.0,)}, r"sigma_interval is \(2.0,\); expected \(low, high\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MCLR(**changes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negatives": "prior", "beta": 1.0}, "no minimum.* = 0.5.*posterior"),
        ({"beta": 0.25}, "more than .* = 5 times too large"),
        ({"negatives": "prior", "bound": "clip"}, "more than .* = 2 times"),
        ({"beta": 0.0, "negatives": "prior"}, "^Lower config.optimizer.learning_rate"),
    ],
)
def test_its_advice_is_about_the_form_that_diverged(options, words):
    assert re.search(words, MCLR(**options).advice())


@pytest.mark.parametrize("share", [0.0, 0.3, 1 / 3, 0.75, 2.0])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match=rf"negative_share is {share}. (Did .*)?Known: .*0\.25"):
        MCLR(negative_share=share)
