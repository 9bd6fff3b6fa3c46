"""DiT of diffusers: its outputs, the trajectories of its pipeline, and folders in and out.

Covers mclr_jax/pretrained/diffusers.py; tests/test_autoencoder.py has the autoencoder.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mclr_jax import guidance, samplers
from mclr_jax.denoiser import EDM, Epsilon
from mclr_jax.pretrained import diffusers
from mclr_jax.types import Condition

FOLDERS = pathlib.Path(__file__).parent / "data" / "formats" / "diffusers"
FOLDER = FOLDERS / "DiT-pipeline"
REFERENCE = dict(np.load(FOLDERS / "DiT-pipeline.reference.npz"))
WEIGHTS = "diffusion_pytorch_model.safetensors"
X, T, Y = (REFERENCE[f"input/{name}"] for name in "xty")
BLOCK = "transformer_blocks.{}.norm1."
EMB = f"{BLOCK}emb."


def close(actual, expected, limit=1e-5):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error < limit, error


def read(folder):
    return diffusers.read(folder, diffusers.weights(diffusers.transformer(folder)))


def output(checkpoint, labels=Y):
    """The raw output, in the order of PyTorch."""
    inputs = jnp.moveaxis(X, 1, -1), jnp.float32(T), Condition(jnp.int32(labels))
    run = jax.jit(lambda params: checkpoint.model.network.apply({"params": params}, *inputs))
    return np.moveaxis(run(checkpoint.params), -1, 1)


def folder(tmp_path, part="transformer", change=lambda config: config, tensors=lambda x: x):
    """A copy of the pipeline with another config of a part, and other tensors."""
    shutil.copytree(FOLDER, copy := tmp_path / "copy")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((copy / part / name).read_text())
    (copy / part / name).write_text(json.dumps(change(config)))
    state = load_file(copy / "transformer" / WEIGHTS)
    save_file(tensors(state), copy / "transformer" / WEIGHTS)
    return copy


@pytest.fixture(scope="module")
def pipeline():
    return read(FOLDER)


@pytest.mark.parametrize("name", ["DiT-pipeline", "DiT-pipeline-2023/transformer"])
def test_official_outputs(name):
    """Of the newest files, and of the folder of a transformer alone as of 2023."""
    checkpoint = read(FOLDERS / name)
    close(output(checkpoint), REFERENCE["output/diffusers"])
    close(output(checkpoint, np.full(4, 1000)), REFERENCE["output/diffusers_null"])
    assert checkpoint.model.data.shape == (8, 8, 4)
    assert checkpoint.model.preconditioning == Epsilon()


def test_the_network_of_dit_is_another(pipeline):
    """With DiT's frequencies and epsilon it is that of facebookresearch/DiT."""
    net = pipeline.model.network.clone(time_endpoint=False, mlp_epsilon=1e-6)
    other = dataclasses.replace(pipeline, model=dataclasses.replace(pipeline.model, network=net))
    close(output(other), REFERENCE["output/diffusers_with_dit_frequencies_and_eps"])
    with pytest.raises(AssertionError):
        close(output(other), REFERENCE["output/diffusers"], 1e-2)


@pytest.mark.parametrize(("name", "scale"), [("pipeline", 1.0), ("pipeline_cfg", 4.0)])
def test_trajectories_and_images_of_the_pipeline(pipeline, name, scale):
    """DDIM is Euler's method in sigma; timesteps are multiples of 1000 // steps."""
    model, params = pipeline.model, pipeline.params
    steps = len(REFERENCE[f"{name}/timesteps"])
    times = np.arange(steps)[::-1] * (1000 // steps)
    np.testing.assert_array_equal(times, REFERENCE[f"{name}/timesteps"])
    sigmas = np.append(model.preconditioning.table[times], 0).astype(np.float32)
    guided = guidance.classifier_free(model.denoise(params), model.null_label, scale)
    seen, inputs = [], np.moveaxis(REFERENCE[f"{name}/x_in"], 2, -1)

    def denoise(x, sigma, condition):
        jax.debug.callback(lambda x, s: seen.append(x / np.sqrt(1 + s[0] ** 2)), x, sigma,
                           ordered=True)  # fmt: skip
        return guided(x, sigma, condition)

    start = jnp.asarray(inputs[0] * np.sqrt(1 + sigmas[0] ** 2))
    labels = jnp.int32(REFERENCE[f"{name}/labels"])
    latents = samplers.sample(denoise, start, labels, sigmas, "euler")
    for got, expected in zip(seen, inputs, strict=True):
        close(got, expected, 1e-4)
    raw = np.asarray(latents) * model.data.scale + np.asarray(model.data.offset)
    close(np.moveaxis(raw, -1, 1), REFERENCE[f"{name}/latents_over_scale"], 1e-4)
    network, weights = diffusers.autoencoder(pipeline.facts["autoencoder"])
    decoded = network.apply({"params": weights}, jnp.float32(raw), method="decode")
    images = np.clip(np.moveaxis(decoded, -1, 1) / 2 + 0.5, 0, 1)
    close(images, REFERENCE[f"{name}/images"], 1e-4)


def test_what_a_pipeline_says_beside_its_weights(pipeline):
    facts = pipeline.facts
    assert facts["id2label"]["999"] == "fixture class 999, synonym of 999"
    assert (facts["latents"], facts["autoencoder"]) == ("stable_diffusion", str(FOLDER / "vae"))
    np.testing.assert_allclose(pipeline.model.data.scale, [1 / 0.18215] * 4)


def test_every_tensor_comes_back_bit_for_bit(pipeline):
    found, expected = diffusers.state(pipeline), load_file(FOLDER / "transformer" / WEIGHTS)
    assert not pipeline.model.network.own_embeddings
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_blocks_whose_embedders_differ_keep_their_own(tmp_path):
    """With constant embeddings e_i of block i, its modulation W silu(e_i) + b is a bias alone.

    The last layer is modulated by the embedding of block 0.
    """
    rng = np.random.default_rng(0)
    e = rng.normal(size=(2, 24)).astype(np.float32)

    def constant(state):
        for i in range(2):
            state[f"{EMB.format(i)}timestep_embedder.linear_2.weight"] = np.zeros((24, 24), "f4")
            state[f"{EMB.format(i)}timestep_embedder.linear_2.bias"] = e[i]
            state[f"{EMB.format(i)}class_embedder.embedding_table.weight"] = np.zeros(
                (1001, 24), np.float32
            )
        return state

    def folded(state):
        layers = {f"{BLOCK.format(i)}linear": i for i in range(2)} | {"proj_out_1": 0}
        for name, i in layers.items():
            kernel, silu = state[f"{name}.weight"], e[i] / (1 + np.exp(-e[i]))
            state[f"{name}.bias"] = state[f"{name}.bias"] + kernel @ silu
            state[f"{name}.weight"] = 0 * kernel
        return state

    (tmp_path / "own").mkdir()
    own = read(folder(tmp_path / "own", tensors=constant))
    shared = read(folder(tmp_path, tensors=folded))
    assert own.model.network.own_embeddings
    assert not shared.model.network.own_embeddings
    close(output(own), output(shared))
    kept = load_file(tmp_path / "own" / "copy" / "transformer" / WEIGHTS)
    assert diffusers.state(own).keys() == kept.keys()
    for name, value in diffusers.state(own).items():
        np.testing.assert_array_equal(value, kept[name], err_msg=name)


@pytest.mark.parametrize("value", [None, np.zeros((3, 24), np.float32)])
def test_a_copy_of_an_embedder_that_is_missing_or_misshapen_is_named(tmp_path, value):
    def damaged(state):
        name = f"{EMB.format(1)}class_embedder.embedding_table.weight"
        kept = {key: x for key, x in state.items() if key != name}
        return kept if value is None else kept | {name: value}

    with pytest.raises(ValueError, match=r"tensor 'transformer_blocks\.1\.norm1\.emb\.class"):
        read(folder(tmp_path, tensors=damaged))


def test_a_pipeline_is_written_as_it_was_read(tmp_path, pipeline):
    """All files but the weights are the same, and these are as told."""
    checkpoint = dataclasses.replace(pipeline, facts={**pipeline.facts, "file": str(FOLDER)})
    state = {k: 2 * v for k, v in diffusers.state(checkpoint).items()}
    diffusers.write(new := tmp_path / "a" / "new", checkpoint, state)
    files = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    assert files == {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file()}
    for name in files - {pathlib.Path("transformer") / WEIGHTS}:
        assert (new / name).read_bytes() == (FOLDER / name).read_bytes(), name
    again = read(new)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), again.params,
                 pipeline.params)  # fmt: skip
    with pytest.raises(ValueError, match="exists; give a new folder"):
        diffusers.write(new, checkpoint, state)


def test_a_transformer_alone_is_written_alone(tmp_path):
    source = FOLDER / "transformer"
    checkpoint = read(source)
    assert checkpoint.facts == {}
    checkpoint = dataclasses.replace(checkpoint, facts={"file": str(source)})
    diffusers.write(tmp_path / "new", checkpoint, diffusers.state(checkpoint))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", WEIGHTS}
    close(output(read(tmp_path / "new")), REFERENCE["output/diffusers"])


def test_folders_that_cannot_be_written(tmp_path, pipeline):
    gone = dataclasses.replace(pipeline, facts={"file": str(tmp_path / "gone")})
    with pytest.raises(FileNotFoundError, match="the folder that this run was read from"):
        diffusers.write(tmp_path / "new", gone, {})
    model = dataclasses.replace(pipeline.model, preconditioning=EDM())
    other = dataclasses.replace(pipeline, model=model, facts={"file": str(FOLDER)})
    with pytest.raises(ValueError, match=r"predicts the noise \(epsilon\); this run has EDM"):
        diffusers.write(tmp_path / "new", other, {})
    assert not (tmp_path / "new").exists()


def test_the_process_is_that_of_the_scheduler(tmp_path):
    change = {"beta_start": 2e-4, "beta_end": 0.01, "num_train_timesteps": 500}
    copy = folder(tmp_path, "scheduler", lambda config: config | change)
    assert read(copy).model.preconditioning == Epsilon((2e-4, 0.01), 500)


def test_another_way_to_sample_is_told(tmp_path, caplog):
    copy = folder(tmp_path, "scheduler", lambda config: config | {"clip_sample": True})
    read(copy)
    assert "clip_sample is True; samples here are as if it were False" in caplog.text


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("scheduler", "beta_schedule", "scaled_linear", "'scaled_linear'; only 'linear'"),
        ("scheduler", "prediction_type", "v_prediction", "only 'epsilon'"),
        ("scheduler", "trained_betas", [0.1], "trained_betas"),
        ("scheduler", "beta_end", 2.0, r"betas is \(0\.0001, 2\.0\)"),
        ("transformer", "norm_type", "ada_norm", "norm_type is 'ada_norm'; only 'ada_norm_zero'"),
        ("transformer", "_class_name", "UNet2DModel", "_class_name is 'UNet2DModel'; only 'DiTTr"),
        ("transformer", "_class_name", None, "_class_name is None; only 'DiTTr"),
        ("transformer", "caption_channels", 4096, "no key 'caption_channels'"),
        ("transformer", "num_attention_heads", "4", "num_attention_heads is '4'"),
        ("transformer", "num_layers", 3, r"do not fit .*transformer_blocks\.2\..* is missing"),
        ("transformer", "num_layers", 1, r"transformer_blocks\.1\..* is unexpected"),
        ("transformer", "attention_head_dim", 5, "do not fit"),
        ("transformer", "num_embeds_ada_norm", 10, r"embedding_table.* expected .*\(11, 24\)"),
    ],
)
def test_other_networks_and_processes_are_refused_by_name(tmp_path, part, key, value, message):
    with pytest.raises(ValueError, match=message):
        read(folder(tmp_path, part, lambda config: config | {key: value}))
