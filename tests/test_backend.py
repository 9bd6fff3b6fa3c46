"""The backend that programs are traced for; what attention asks it is in test_layers.py."""

import jax
import jax.numpy as jnp
import tiny

from mclr_jax import backend
from mclr_jax.config import Training
from mclr_jax.networks import layers


def test_programs_for_others_are_not_those_of_the_cpu():
    """The CPU's convolution is an operation of this package, and its steps are single."""
    shapes = (1, 4, 4, 3), (3, 3, 3, 5)
    training = Training.parse(tiny.config("digits", steps_per_dispatch=0))

    def operations():
        traced = jax.make_jaxpr(lambda *arrays: layers.convolve(*arrays))(*map(jnp.zeros, shapes))
        return [equation.primitive.name for equation in traced.eqns]

    assert "conv_general_dilated" not in operations()
    assert training.dispatch == 1
    with backend.programs_for_others():
        assert operations() == ["conv_general_dilated"]
        assert training.dispatch == 8
    assert "conv_general_dilated" not in operations()
