"""What all networks promise: types, dropout by example, optional inputs, recomputed blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from nvlabs import error

from mclr_jax import backend
from mclr_jax.networks.autoencoder import Autoencoder
from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.edm2 import EDM2
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.trajectory import FrameDiT, Trajectory
from mclr_jax.networks.unet import UNet
from mclr_jax.plan import flops
from mclr_jax.pretrained.dit import SIZES
from mclr_jax.types import Condition

OPTIONS = {"augment_dim": 2, "takes_strength": True, "dropout": 0.4}
MANY = {"channels": 8, "channel_mult": (1,), "num_blocks": 1, "attention_resolutions": (4,)}
NETWORKS = {  # and the shape of an example
    "mlp": (MLP(num_classes=3, width=16, depth=2), (2,)),
    "ncsnpp": (UNet("ncsnpp", num_classes=3, **MANY), (4, 4, 3)),
    "edm2": (EDM2(num_classes=3, channels_per_head=4, **MANY), (4, 4, 3)),
    "dit": (DiT(num_classes=3, width=16, depth=2, heads=2, scan_blocks=True), (4, 4, 3)),
    "trajectory": (Trajectory(num_classes=3, width=8, depth=2, heads=2), (4, 3)),
    "frame_dit": (FrameDiT(num_classes=3, width=8, depth=2, heads=2, patch_size=2), (3, 4, 4, 1)),
    "mlp_classifier": (MLPClassifier(num_classes=3, width=16, depth=2), (2,)),
    "conv_classifier": (ConvClassifier(num_classes=3, channels=(8, 12)), (8, 4, 1)),
}
BATCH = 3
GIVEN = {"strength": np.float32([0.5, 1, 3]), "augment": tiny.normal(1, BATCH, 2)}
NONE = jax.tree.map(np.zeros_like, GIVEN)
KEYS = jax.random.split(jax.random.key(2), BATCH)


@functools.cache
def made(name):
    """The network compiled, its inputs, random parameters, and its answer to these."""
    network, shape = NETWORKS[name]
    network = network.clone(**OPTIONS)
    frames = shape[:1] if "trajectory" in name or "frame" in name else ()
    inputs = tiny.normal(0, BATCH, *shape), tiny.normal(3, BATCH, *frames)
    condition = Condition(np.int32([0, 1, 3]), **NONE)  # 3: the null label
    params = tiny.params(network, *inputs, condition)
    inputs = *inputs, condition
    apply = jax.jit(network.apply)
    return network, apply, inputs, params, apply({"params": params}, *inputs)


each = pytest.mark.parametrize("name", NETWORKS)


@each
def test_bfloat16_changes_little(name):
    network, _, inputs, params, plain = made(name)
    half = jax.jit(network.clone(dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert half.dtype == jnp.float32
    assert 1e-4 < error(half, plain) < 0.1


@each
def test_dropout_needs_keys_and_takes_one_for_each_example(name):
    """The masks are those of a network whose blocks are made again in the backward pass, too."""
    network, apply, (*inputs, condition), params, plain = made(name)
    told = *inputs, condition.replace(dropout_keys=KEYS)
    dropped = apply({"params": params}, *told)
    assert np.abs(dropped - plain).reshape(BATCH, -1).max(1).min() > 1e-3
    turned = apply({"params": params}, *jax.tree.map(lambda x: x[::-1], told))
    assert error(turned[::-1], dropped) < 1e-4
    again = jax.jit(network.clone(remat=True).apply)({"params": params}, *told)
    assert error(again, dropped) < 1e-4


@each
def test_optional_inputs_enter_by_kernels_and_are_absent_at_zero(name):
    network, apply, (*inputs, condition), params, plain = made(name)

    def change(params, given):
        return error(apply({"params": params}, *inputs, condition.replace(**given)), plain)

    for key in GIVEN:
        assert change(params, NONE | {key: GIVEN[key]}) > 1e-3
    trunk = params.get("trunk", params)
    fresh = trunk | jax.tree.map(jnp.zeros_like, {n: trunk[n] for n in network.optional_inputs})
    assert change({**params, "trunk": fresh} if "trunk" in params else fresh, GIVEN) < 1e-5


@each
def test_blocks_are_recomputed_in_the_backward_pass_if_asked_for(name):
    """Which products are repeated is told by tests/test_dit.py."""
    network, _, inputs, params, _ = made(name)

    def cost(**options):
        def loss(params):
            return jnp.mean(network.clone(**options).apply({"params": params}, *inputs) ** 2)

        with backend.programs_for_others():
            return flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    assert cost(remat=True) > 1.1 * cost()


# Millions: Karras et al. 2022, Table 7; Karras et al. 2024, Table 2; Peebles and Xie 2023, Table 4
# (DiT-XL/2 has 675,129,632 with its table of positions).
PUBLISHED = {
    "CIFAR-10": (UNet(num_classes=0, augment_dim=9), (32, 32, 3), 55.7),
    "FFHQ": (UNet(num_classes=0, augment_dim=9, channel_mult=(1, 2, 2, 2)), (64, 64, 3), 61.8),
    "ImageNet": (UNet("adm", 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8), channels_per_head=64),
                 (64, 64, 3), 295.9),
    **{f"EDM2-{channels}": (EDM2(4, 1000, channels=channels), (64, 64, 4), millions)
       for channels, millions in
       {128: 125, 192: 280, 256: 498, 320: 777, 384: 1119, 448: 1523}.items()},
    **{f"DiT-{size}/2": (DiT(8, 1000, 2, *SIZES[size]), (32, 32, 4), millions)
       for size, millions in {"XL": 674.83472, "L": 458, "B": 130, "S": 33}.items()},
    "Stable Diffusion": (Autoencoder(block_out_channels=(128, 256, 512, 512), layers_per_block=2),
                         (64, 64, 3), 83.653863),
}  # fmt: skip
LONG = ("FFHQ", "EDM2-192", "EDM2-256", "EDM2-320", "EDM2-384")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in PUBLISHED
])  # fmt: skip
def test_numbers_of_parameters_are_the_published_ones(name):
    """Fourier features are no parameters there, and positions none here."""
    network, shape, millions = PUBLISHED[name]
    inputs = [jnp.zeros((1, *shape)), jnp.zeros(1), Condition(jnp.zeros(1, jnp.int32))]
    inputs = inputs[:1] if isinstance(network, Autoencoder) else inputs
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    count = sum(
        leaf.size for path, leaf in traverse_util.flatten_dict(shapes).items()
        if not path[-1].endswith(("freqs", "phases"))
    )  # fmt: skip
    assert round(count / 1e6, len(str(millions).partition(".")[2])) == millions
