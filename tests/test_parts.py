"""A model and its description, from which a run makes it again."""

import json
from typing import Any

import flax.linen as nn
import pytest
import tiny
from ml_collections import ConfigDict

from mclr_jax import parts
from mclr_jax.config import Training
from mclr_jax.denoiser import EDM, Epsilon, V, Velocity
from mclr_jax.model import DataInfo, Model
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.unet import UNet

DATA = DataInfo((8, 8, 1), 10, 0.5)


class Guest(nn.Module):
    """A network from outside the tables, without anything optional."""

    widths: tuple[Any, ...] = (4, 8)

    def __call__(self, x, c_noise, condition):
        return x


@pytest.mark.parametrize(
    "model",
    [
        Model(MLP(2, 3, width=8, dtype="bfloat16"), EDM(0.7), DataInfo((2,), 3, 0.7, (0.3, 0.7))),
        Model(MLP(2, 3, per_frame=True, dtype="float32"), V(tau=0.5), DataInfo((4, 2), 3, 1.0)),
        Model(DiT(dtype="float32"), Velocity(0), DATA),
        Model(
            DiT(dtype="float32", takes_strength=True), Epsilon((1e-3, 0.1), 10), DATA, (0.0, 2.0)
        ),
        Model(UNet(channel_mult=(1, 2), dtype="float32"), Epsilon(), DATA),
        Model(Guest((2, (3, (4,)))), EDM(), DATA),
    ],
)
def test_a_model_is_its_description(model):
    text = json.dumps(parts.describe(model), allow_nan=False)
    again = parts.model_of(json.loads(text))
    assert again == model
    assert hash(again) == hash(model)
    assert json.dumps(parts.describe(again)) == text


def test_descriptions_name_what_they_can_and_say_every_value():
    found = parts.describe(Model(MLP(2, 3, dtype="float32"), Velocity(), DATA))
    assert found["network"]["name"] == "mlp"
    assert found["network"]["depth"] == 4  # a default
    expected = {"name": "velocity", "data_at": 1, "path": "linear", "prediction": "velocity"}
    assert found["preconditioning"] == expected
    guest = parts.describe(Model(Guest(), EDM(), DATA))
    assert guest["network"] == {"name": f"{__name__}:Guest", "widths": [4, 8]}


@pytest.mark.parametrize("name", parts.NETWORKS)
def test_a_config_that_leaves_everything_out_describes_its_model_too(name):
    """Among the rest the type of computation, which a description has by its name."""
    config = tiny.config("digits")
    config.network = ConfigDict({"name": name})
    model = Training.parse(config).model(DATA)
    assert parts.model_of(json.loads(json.dumps(parts.describe(model)))) == model


def test_descriptions_have_units_where_the_data_have_them():
    """And no others, as in the descriptions of runs before there were units."""
    network, units = MLP(2, 3, dtype="float32"), ((0.0, 25.0), (8.0, 9.0), 0.025)
    plain = parts.describe(Model(network, EDM(), DataInfo((2,), 3, 1.0)))
    assert plain["data"].keys() == {"shape", "num_classes", "sigma_data", "class_prior"}
    model = Model(network, EDM(), DataInfo((2,), 3, 1.0, (), *units))
    found = json.loads(json.dumps(parts.describe(model)))
    assert found["data"]["offset"] == [0, 25]
    assert parts.model_of(found) == model
