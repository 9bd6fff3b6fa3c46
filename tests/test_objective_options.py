"""Options of the objectives: what they need, which are refused, and MCLR's advice."""

import math
import re

import pytest

from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ContrastiveFlow, ModelGuidance


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (MCLR(), {"class_prior", "posterior"}),
        (MCLR(negatives="prior"), {"class_prior"}),
        (MCLR(negatives="mismatched", bound="clip"), {"class_prior"}),
        (MCLR(negatives="prior", weighting="cfg"), {"class_prior", "posterior"}),
        (MCLR(negatives="prior", target="reference"), {"class_prior", "reference"}),
        (NullMCLR(target="data"), {"reference"}),
        (NullMCLR(teacher="average"), {"average"}),
        (NullMCLR(wrong="weak"), {"reference", "weak"}),
        (NullMCLR(wrong="weak", target="data"), {"weak"}),
        (
            NullMCLR(teacher="average", wrong_label=0.5),
            {"average", "reference", "class_prior"},
        ),
    ],
)
def test_an_objective_needs_what_it_reads(objective, needs):
    assert objective.needs == needs | {"class_strengths"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MCLR, {"negatives": "wrong"}, "negatives is 'wrong'. (Did .*)?Known: .*mismatched"),
        (MCLR, {"weighting": "cfg"}, "CFG-equivalent form already"),
        (MCLR, {"beta": -0.5}, "beta is -0.5; expected a number of at least 0"),
        (MCLR, {"clip_ratio": math.nan}, "clip_ratio is nan; expected a number"),
        (MCLR, {"sigma_interval": (2.0, 1.0)}, r"sigma_interval is \(2.0, 1.0\); .*low < high"),
        (MCLR, {"sigma_interval": (2.0,)}, r"sigma_interval is \(2.0,\); expected \(low, high\)"),
        (MCLR, {"negative_share": 1 / 3}, r"negative_share is 0.33.* (Did .*)?Known: .*0\.25"),
        (NullMCLR, {"target": "x"}, "target is 'x'. (Did .*)?Known: .*mixed"),
        (NullMCLR, {"wrong_label": math.inf}, "wrong_label is inf; expected a number"),
        (NullMCLR, {"wrong_label_scale": 0.0}, "wrong_label_scale is 0.0; .*above 0"),
        (ModelGuidance, {"scale": 1.0}, "scale is 1.0; expected .* at least 0 and below 1"),
        (ModelGuidance, {"relative_interval": (3.0, 1.0)}, "relative_interval is .*low < high"),
        (ContrastiveFlow, {"contrast": 1.0}, "contrast is 1.0; expected .* at least 0 and below 1"),
        (CCA, {"beta": 0.0}, "beta is 0.0; expected a number above 0"),
        (CCA, {"negative_weight": -1.0}, "negative_weight is -1.0; expected a number of at l"),
        (DPO, {"beta": -1.0}, "beta is -1.0; expected a number above 0"),
        (DDO, {"beta": 0.0}, "beta is 0.0; expected a number above 0"),
        (GFT, {"beta": -1.0}, "beta is -1.0; expected a number of at least 0"),
        (DSM, {"variance_power": 2.0}, r"objective\.variance_power is 2\.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negatives": "prior", "beta": 1.0}, "no minimum.* = 0.5.*posterior"),
        ({"beta": 0.25}, "more than .* = 5 times too large"),
        ({"negatives": "prior", "bound": "clip"}, "more than .* = 2 times"),
        ({"beta": 0.0, "negatives": "prior"}, "^Lower config.optimizer.learning_rate"),
    ],
)
def test_mclrs_advice_is_about_the_form_that_diverged(options, words):
    assert re.search(words, MCLR(**options).advice())
