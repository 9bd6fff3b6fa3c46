"""DiT: official weights give the official output (network and converter), and what must not matter.

Covers mclr_jax/networks/dit.py and mclr_jax/pretrained/dit.py.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from nvlabs import error

from mclr_jax.networks import layers
from mclr_jax.networks.dit import Block, DiT
from mclr_jax.plan import flops
from mclr_jax.pretrained import dit as pretrained
from mclr_jax.pretrained.names import to_params
from mclr_jax.types import Condition

ARRAYS = dict(np.load(Path(__file__).parent / "data" / "dit.npz"))
KWARGS = json.loads(str(ARRAYS["meta.json"]))["kwargs"]
PREFIX = "state_dict/"
STATE = {k.removeprefix(PREFIX): v for k, v in ARRAYS.items() if k.startswith(PREFIX)}
NET = DiT(
    out_channels=2 * KWARGS["in_channels"],
    num_classes=KWARGS["num_classes"],
    patch_size=KWARGS["patch_size"],
    width=KWARGS["hidden_size"],
    depth=KWARGS["depth"],
    heads=KWARGS["num_heads"],
    time_scale=1.0,
)
X = jnp.asarray(ARRAYS["input/x"].transpose(0, 2, 3, 1))
T, LABEL = jnp.asarray(ARRAYS["input/t"]), jnp.asarray(ARRAYS["input/y"], jnp.int32)
PLAIN = X, T, Condition(LABEL)
KEYS = jax.random.split(jax.random.key(0), 3)
DROPPED = X, T, Condition(LABEL, dropout_keys=KEYS)
EXPECTED = ARRAYS["output/out"].transpose(0, 2, 3, 1)


def read(state, net=NET):
    """The parameters of `net`, which computes the position embedding that the file holds."""
    found = pretrained.read("dit", state, {}, {"heads": net.heads})
    assert found.model.network == net.clone(stored_positions=True, dtype="float32")
    return {name: value for name, value in found.params.items() if name != "pos_embed"}


@pytest.fixture(scope="module")
def params():
    return read(STATE)


@jax.jit
def apply(params):
    return NET.apply({"params": params}, *PLAIN)


def test_official_output(params):
    assert KWARGS["num_classes"] in LABEL  # the null label is among the inputs
    assert error(apply(params), EXPECTED) < 1e-5


def test_patches_of_an_image_that_is_no_square_are_where_they_were():
    """Fresh blocks change nothing: the output is one linear map of each normalised token."""
    net, rng = NET.clone(depth=1), np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 6, KWARGS["in_channels"])).astype(np.float32)
    condition = Condition(LABEL[:1])
    params = dict(jax.jit(net.init)(jax.random.key(0), x, T[:1], condition)["params"])
    size = 4 * net.out_channels
    last = {"kernel": rng.normal(size=(48, size)), "bias": rng.normal(size=size)}
    params["final_linear"] = jax.tree.map(jnp.float32, last)
    got = jax.jit(net.apply)({"params": params}, x, T[:1], condition)[0]
    embed = jax.tree.map(np.float64, params["x_embedder"])
    for row, column in np.ndindex(2, 3):
        place = np.s_[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        angles = np.outer([column, row], 1e-4 ** (np.arange(12) / 12))
        position = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).ravel()
        token = x[0][place].ravel() @ embed["kernel"] + embed["bias"] + position
        token = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
        expected = (token @ last["kernel"] + last["bias"]).reshape(2, 2, -1)
        np.testing.assert_allclose(got[place], expected, rtol=1e-4, atol=1e-4)


def test_unit_conditions_start_larger_than_the_official_ones():
    """The table of classes with variance 1, and the maps of the level with 1 / inputs."""
    net = NET.clone(width=96, depth=1, num_classes=200, unit_condition=True)
    params = jax.jit(net.init)(jax.random.key(0), *PLAIN)["params"]
    assert np.std(params["y_embedder"]["embedding"]) == pytest.approx(1, rel=0.03)
    for name, inputs in [("t_embedder_0", 256), ("t_embedder_2", 96)]:
        assert np.std(params[name]["kernel"]) == pytest.approx(inputs**-0.5, rel=0.05)


def test_fresh_network_gives_zero_with_official_initial_weights():
    net = NET.clone(width=96)
    output, variables = jax.jit(net.init_with_output)(jax.random.key(0), *PLAIN)
    np.testing.assert_array_equal(output, 0)
    params, blocks = variables["params"], variables["params"]["blocks"]
    np.testing.assert_array_equal(blocks["adaLN_modulation"]["kernel"], 0)
    assert np.var(blocks["qkv"]["kernel"]) == pytest.approx(2 / (96 + 288), rel=0.03)
    assert not np.allclose(blocks["fc1"]["kernel"][0], blocks["fc1"]["kernel"][1])
    for name, leaf in [("t_embedder_0", "kernel"), ("y_embedder", "embedding")]:
        assert np.std(params[name][leaf]) == pytest.approx(0.02, rel=0.1)


def test_scan_and_remat_change_nothing(params):
    """The same parameters, dropout and gradients, whether blocks are unrolled or scanned."""
    plain = NET.clone(dropout=0.3)

    def gradient(net):
        def loss(params):
            return jnp.mean(net.apply({"params": params}, *DROPPED) ** 2)

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()),
        gradient(plain.clone(scan_blocks=True, remat=True)), gradient(plain),
    )  # fmt: skip


def test_recomputation_repeats_what_its_policy_does_not_keep(params):
    """In products: none, those of attention, or all of the blocks'."""

    def cost(**options):
        def loss(params):
            return jnp.mean(NET.clone(**options).apply({"params": params}, *PLAIN) ** 2)

        return flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    kept = {name: cost(remat=True, remat_policy=name) - cost() for name in layers.KEPT}
    tokens, width = X.shape[1] * X.shape[2] // NET.patch_size**2, NET.width
    attention = 2 * 2 * len(X) * NET.depth * tokens**2 * width
    assert kept["products"] == 0
    assert kept["weight_products"] == attention
    weights = 6 + tokens * (4 + 2 * NET.mlp_ratio)  # modulation, qkv, projection, MLP
    assert kept["nothing"] == attention + 2 * len(X) * NET.depth * weights * width**2
    with pytest.raises(ValueError, match=r"network.remat_policy is 'dots'.*weight_products"):
        NET.clone(remat_policy="dots")


def test_dropout_depends_on_the_block(params):
    block = Block(heads=3, mlp_ratio=4.0, dropout=0.3, dtype=jnp.float32)
    first = {"params": jax.tree.map(lambda leaf: leaf[0], params["blocks"])}
    tokens = jax.random.normal(jax.random.key(1), (3, 16, 48))
    embedding = jax.random.normal(jax.random.key(2), (3, 48))
    run = jax.jit(block.apply)
    at = [run(first, tokens, jnp.array(i), embedding, KEYS)[0] for i in (0, 1)]
    assert error(at[1], at[0]) > 1e-2  # the same weights, another mask


def test_official_weights_have_no_optional_inputs():
    net = NET.clone(augment_dim=2, takes_strength=True)
    shapes = tiny.params(net, *PLAIN)
    state = {name: value for name, value in STATE.items() if name != "pos_embed"}
    params = to_params(state, shapes, pretrained.names(net))
    assert not any(np.any(params[name]["kernel"]) for name in net.optional_inputs)


def test_wrong_weights_are_named():
    name = "blocks.1.attn.qkv.weight"
    without = {k: v for k, v in STATE.items() if k != name}
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.weight' is missing.*\(144, 48\)"):
        read(without)
    with pytest.raises(
        ValueError, match=r"qkv.weight' is float32 of shape \(143, 48\).*\(144, 48\)"
    ):
        read(STATE | {name: STATE[name][1:]})
    with pytest.raises(ValueError, match=r"'blocks.1.extra' of shape \(2,\) is unexpected"):
        read(STATE | {"blocks.1.extra": np.zeros(2)})
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv.weight' is complex64"):
        read(STATE | {name: STATE[name].astype(np.complex64)})
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight.*missing; expected a DiT"):
        read({})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"patch_size": 3}, "8x8, not divisible by patch_size 3"), ({"heads": 5}, "multiple of 5")],
)
def test_sizes_must_divide(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.params(NET.clone(**change), *PLAIN)


def test_a_feed_forward_layer_of_no_units_is_refused():
    with pytest.raises(ValueError, match=r"mlp_ratio is 0\.05; expected a number of at least 0\.1"):
        DiT(width=8, mlp_ratio=0.05)
