"""What programs are traced for; what attention asks it is in test_layers.py."""

import jax
import jax.numpy as jnp
import tiny

from mclr_jax import main, target
from mclr_jax.networks import layers


def test_programs_for_others_are_not_those_of_the_cpu():
    """The CPU's convolution is an operation of this package, and its steps are single."""
    shapes, config = ((1, 4, 4, 3), (3, 3, 3, 5)), tiny.config("digits", steps_per_dispatch=0)

    def operations():
        traced = jax.make_jaxpr(lambda *arrays: layers.convolve(*arrays))(*map(jnp.zeros, shapes))
        return [equation.primitive.name for equation in traced.eqns]

    assert "conv_general_dilated" not in operations()
    assert main.steps_per_dispatch(config) == 1
    with target.programs_for_others():
        assert operations() == ["conv_general_dilated"]
        assert main.steps_per_dispatch(config) == 8
    assert "conv_general_dilated" not in operations()
