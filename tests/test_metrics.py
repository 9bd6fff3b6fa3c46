import ast
import functools
import inspect
import json
import pathlib
import re
import tracemalloc

import numpy as np
import prdc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mclr_jax.evaluation import evaluate, metrics
from mclr_jax.evaluation.metrics import Moments, frechet_distance, moments
from mclr_jax.hooks import HeldOut
from mclr_jax.representation import icr, memorization, sweep
from mclr_jax.training import log, loop

ROOT = pathlib.Path(__file__).parent.parent

RNG = np.random.default_rng
SEEDS = st.integers(0, 10**6)


def features(seed, n=60, dim=5, mean=0.0):
    """Correlated features of unequal spread, with a mean far from zero where asked."""
    rng = RNG(seed)
    mix = rng.normal(size=(dim, dim)) * rng.uniform(0.1, 2, dim)
    return mean + rng.normal(size=(n, dim)) @ mix


@pytest.fixture
def small_blocks(monkeypatch):
    """About 7 rows of 60 columns in a block, so that every pairwise sum takes several."""
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 7 * 60 * 8)


# --- Closed forms ---------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    """|m1 - m2|^2 + sum_i (s1_i - s2_i)^2, here 3^2 + 4^2 + (1 - 2)^2 + (3 - 1)^2 + 0 = 30."""
    rotation, _ = np.linalg.qr(RNG(0).normal(size=(3, 3)))

    def gaussian(mean, stds):
        return Moments(9, np.array(mean), rotation @ np.diag(np.square(stds)) @ rotation.T)

    distance = frechet_distance(gaussian([0.0, 1, 2], [1, 3, 5]), gaussian([3.0, 5, 2], [2, 1, 5]))
    assert distance == pytest.approx(30, rel=1e-12)
    points = Moments(5, np.zeros(3), np.zeros((3, 3)))  # a covariance of rank 0
    assert frechet_distance(points, gaussian([0.0, 0, 1], [1, 0, 2])) == pytest.approx(1 + 5)


def test_frechet_distances_of_classes_that_are_shifted_copies():
    """Equal covariances: only the shifts count, (9 + 16 + 25) / 3 over the pairs of classes."""
    one, label = features(0), np.repeat([5, 2, 7], 60)
    shift = {5: [0, 0, 0, 0, 0], 2: [3, 0, 0, 0, 0], 7: [0, 4, 0, 0, 0]}
    three = np.concatenate([one + shift[c] for c in (5, 2, 7)])
    order = RNG(1).permutation(180)
    got = metrics.inter_class_frechet(three[order], label[order])
    assert got == pytest.approx(50 / 3, rel=1e-10)
    reference = np.concatenate([one, one, one])
    per_class = metrics.per_class_frechet(three[order], label[order], reference, label)
    np.testing.assert_allclose(per_class, [9, 0, 16], rtol=1e-10, atol=1e-10)  # classes 2, 5, 7


def test_inception_score_of_known_answers():
    assert metrics.inception_score(np.eye(4).repeat(5, 0)) == pytest.approx(4)
    assert metrics.inception_score(np.full((9, 4), 0.25)) == pytest.approx(1)
    two = np.array([[0.9, 0.1], [0.1, 0.9]])  # the marginal is uniform: ln 2 minus the entropy
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert metrics.inception_score(two) == pytest.approx(2 * np.exp(-entropy))


def test_neighbour_metrics_of_points_on_a_line():
    real = np.array([[0.0], [1], [2], [10]])  # k = 1: balls of radius 1, 1, 1 and 8
    fake = np.array([[0.5], [0.6], [2.5], [40.0]])  # radius 0.1, 0.1, 1.9 and 37.5
    # Precision: all but 40. Recall: 1 and 2 are within 1.9 of 2.5, and 10 is within 37.5 of 40.
    assert metrics.precision_recall(real, fake, k=1) == (0.75, 0.75)
    # Fake in balls of 0, 1, 2, 10: 2 + 2 + 1 + 1, the last (2.5, at 7.5 of 10) and 40 in none.
    assert metrics.density_coverage(real, fake, k=1) == (6 / 4, 1.0)


def test_neighbour_metrics_at_the_edge_of_a_ball():
    """Precision and recall take closed balls, density and coverage open ones."""
    line = np.array([[0.0], [1], [3], [7]])
    assert metrics.density_coverage(line, line, k=1) == (1, 1)  # each ball holds its center alone
    ends = np.array([[-1.0], [20], [21]])  # -1 is on the edge of the ball of 0
    assert metrics.precision_recall(line, ends, k=1)[0] == pytest.approx(1 / 3)
    assert metrics.density_coverage(line, ends, k=1) == (0, 0)


def test_copies_are_at_distance_zero_in_spite_of_rounding():
    real = features(0, 50, 40, mean=100).repeat(2, 0)  # so all radii are zero
    assert metrics.precision_recall(real, real[::-1][:41], k=1)[0] == 1
    assert metrics.density_coverage(real, real[::-1][:41], k=1) == (0, 0)


@pytest.mark.parametrize("function", [metrics.precision_recall, metrics.kernel_distance])
def test_memory_is_bounded_by_the_blocks(monkeypatch, function):
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 2**18)
    real, fake = RNG(0).normal(size=(2, 1500, 2))  # 17 MiB of distances
    tracemalloc.start()
    function(real, fake)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**18


def test_kernel_distance_of_points_on_a_line():
    """x = (0, 1), y = (1, 2, 3): 1 + (27 + 64 + 343) / 3 - 2 (1 + 1 + 1 + 8 + 27 + 64) / 6."""
    got = metrics.kernel_distance(np.array([[0.0], [1]]), np.array([[1.0], [2], [3]]))
    assert got == pytest.approx(1 + 434 / 3 - 34)


# --- Parity with other implementations ------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(100, 80, 1), (100, 80, 40), (10, 14, 64)])  # n, m and d
def test_frechet_distance_matches_singular_values_of_the_samples(sizes):
    """tr (C1 C2)^(1/2) is the nuclear norm of X1 X2^T / sqrt((n1 - 1) (n2 - 1)), X centered."""
    a, b = features(0, sizes[0], sizes[2]), features(1, sizes[1], sizes[2], mean=0.3)
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    shift = np.sum((a.mean(0) - b.mean(0)) ** 2)
    expected = shift + np.sum(x**2) + np.sum(y**2) - 2 * np.linalg.norm(x @ y.T, "nuc")
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(a), moments(a)) <= 1e-10 * np.sum(a**2)


@pytest.mark.usefixtures("small_blocks")
def test_neighbour_metrics_match_prdc(capsys):
    for seed, (n, m, k) in enumerate([(100, 100, 5), (60, 150, 3), (90, 40, 1)]):
        real, fake = features(seed, n, 4), features(seed, m, 4, mean=0.5) * 0.9
        expected = prdc.compute_prdc(real, fake, nearest_k=k)
        got = (*metrics.precision_recall(real, fake, k), *metrics.density_coverage(real, fake, k))
        names = ("precision", "recall", "density", "coverage")
        np.testing.assert_allclose(got, [expected[name] for name in names], rtol=1e-12)
    capsys.readouterr()  # prdc prints


@pytest.mark.usefixtures("small_blocks")
def test_scores_are_those_of_torch_fidelity():
    """FID, KID of all pairs, inception score, precision and recall, stored with its version."""
    expected = json.loads((pathlib.Path(__file__).parent / "data/torch_fidelity.json").read_text())
    logits = 3 * RNG(0).normal(size=(200, 10))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    real, fake = features(0, 70), features(1, 70, mean=0.5)
    got = {
        "inception_score": metrics.inception_score(probs),
        "kernel_distance": metrics.kernel_distance(real, fake),
        "frechet_distance": frechet_distance(moments(real), moments(fake)),
    }
    assert got == pytest.approx({name: expected[name] for name in got}, rel=1e-8)
    for k in (1, 3):
        found = metrics.precision_recall(real, fake, k)
        assert found == pytest.approx(expected[f"precision_recall_{k}"], rel=1e-6)  # float32 there


# --- Properties -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS, sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), mean=st.floats(0, 1e6)
)
def test_moments_of_any_split_merge_to_those_of_the_whole(seed, sizes, mean):
    whole = features(seed, sum(sizes), 3, mean)
    batches = np.split(whole, np.cumsum(sizes)[:-1])
    merged = functools.reduce(Moments.merge, map(moments, batches))
    assert merged.count == len(whole)
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    exact = np.cov(whole, rowvar=False)
    atol = (1e-10 + 1e-14 * mean) * np.abs(exact).max() + 1e-20 * mean**2
    np.testing.assert_allclose(merged.cov, exact, rtol=0, atol=atol)


def test_moments_of_single_precision_features_do_not_cancel():
    small = (1000 + 0.1 * RNG(0).normal(size=(500, 3))).astype(np.float32)
    expected = np.cov(small.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments(small).cov, expected, rtol=1e-9, atol=1e-12)


# --- Errors ---------------------------------------------------------------------------------------

A, B, LABELS = features(0, 8, 3), features(1, 8, 4), np.arange(8) % 2
BROKEN = np.where(np.arange(24).reshape(8, 3) == 7, np.nan, A)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(moments(A[:1]), moments(A)), "1 feature vector.*at least 2"),
        (lambda: frechet_distance(moments(A), moments(B)), "3 and of 4 dimensions"),
        (lambda: moments(A).merge(moments(B)), "3 and of 4 dimensions"),
        (lambda: moments(BROKEN), "not finite in 1 of 8 rows, first 2"),
        (lambda: moments(A[0]), r"features of shape \(3,\); expected \(n, d\)"),
        (lambda: moments(A[:0]), r"shape \(0, 3\).*not empty"),
        (lambda: metrics.inter_class_frechet(A, LABELS[:5]), r"labels of shape \(5,\) for 8"),
        (lambda: metrics.inter_class_frechet(A, LABELS * 0), "one class"),
        (lambda: metrics.inter_class_frechet(A, np.arange(8) // 7), "1 sample of class 1"),
        (lambda: metrics.per_class_frechet(A, LABELS, A, LABELS + 1), r"\[0, 1\].*\[1, 2\]"),
        (lambda: metrics.inception_score(A), "minimum -.*softmax"),
        (lambda: metrics.inception_score(np.full((3, 2), 0.6)), "up to 0.2 off one"),
        (lambda: metrics.precision_recall(A, A[:3]), "k=3, 3 fake .* out of --metrics"),
        (lambda: metrics.precision_recall(A, A, k=0), "k=0, 8 real"),
        (lambda: metrics.precision_recall(A, B), "3 and of 4"),
        (lambda: metrics.density_coverage(A, A, k=8), "k=8, 8 real"),
        (lambda: metrics.density_coverage(A, BROKEN), "fake features not finite"),
        (lambda: metrics.kernel_distance(A[:1], A), "1 real and 8 fake"),
    ],
)
def test_errors_say_what_was_got_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_memorized_fraction_is_the_ratio_of_the_two_nearest(real_count, fake_count, dim, seed):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(real_count, dim))
    fake = rng.normal(size=(fake_count, dim))
    fake[0] = real[0] + 1e-3 * rng.normal(size=dim)
    distances = np.sort(np.linalg.norm(fake[:, None] - real, axis=-1), axis=1)
    expected = (distances[:, 0] < distances[:, 1] / 3).mean()
    assert metrics.memorized_fraction(real, fake) == expected
    batches = np.array_split(real, min(3, real_count))
    assert metrics.memorized_fraction(iter(batches), fake) == expected


def test_the_two_nearest_are_found_across_batches():
    """Among 40 points in three batches, by brute force; equal points have the ratio 1."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(9, 3))
    apart = np.linalg.norm(fake[:, None] - real, axis=-1)
    order = np.argsort(apart, axis=1)[:, :2]
    distances, rows = metrics.two_nearest(iter(np.split(real, [5, 17])), fake)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, np.take_along_axis(apart, order, 1), rtol=1e-6)
    np.testing.assert_array_equal(metrics.copy_ratios(np.array([[0.0, 0.0], [1, 4]])), [1, 0.25])


def test_memorized_fraction_of_copies_and_of_nothing():
    real = np.random.default_rng(0).normal(size=(50, 8))
    assert metrics.memorized_fraction(real, real[:10]) == 1
    assert metrics.memorized_fraction(real, (real[:10] + real[10:20]) / 2) == 0
    with pytest.raises(ValueError, match="fewer than 2 real"):
        metrics.memorized_fraction(real[:1], real)


def logged():
    """The names of all metrics that the objectives and the step report: of reductions, by name."""
    kinds, found = {"mean", "ratio", "effective_share", "maximum", "over_rows"}, set()
    files = [*(ROOT / "mclr_jax" / "objectives").glob("*.py"), ROOT / "mclr_jax/training/step.py"]
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        pairs = []
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            pairs = [(node.targets[0].slice, node.value)]
        for key, value in pairs:
            called = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
            if called and value.func.id in kinds and isinstance(key, ast.Constant):
                found.add(key.value)
    return found


def test_the_glossary_has_the_names_of_the_code_and_no_others():
    """On the command line, in tables, in rows of an evaluation and in metrics.jsonl."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    page = page.partition("## Glossary")[2].partition("\n## ")[0]
    samples, training = page.split("| training |")
    glossary = [
        {name for row in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
         for name in re.findall(r"`(\w+)`", row)}
        for part in (samples, training)
    ]  # fmt: skip
    copied = dict.fromkeys(("memorized", "copy_ratio"), metrics.copy_measures)
    names = {**copied, "accuracy": evaluate.measure,
             "network_calls": evaluate.evaluate, "samples_per_second": evaluate.evaluate,
             "sample_accuracy": evaluate.Measures}  # fmt: skip
    assert glossary[0] == {*evaluate.METRICS, *names}
    more = {"learning_rate": loop.run, "images_per_second": log.Writer, "eval_NAME": HeldOut,
            "peak_memory_gib": log.Writer, "icr": sweep.Monitor,
            "icr_memorized": sweep.Monitor}  # fmt: skip
    stages = ("gap", "error", "sigma", "warning", "copies", "copies_by_features", "one_call")
    more |= {f"memorization_{stage}": memorization for stage in stages}
    x = np.random.default_rng(0).normal(size=(8, 2, 3))
    traces = {f"icr_{name}" for name in icr.traces(icr.views(x))}
    assert glossary[1] == {*logged(), *more, *traces}
    for name, where in {**names, **more}.items():
        assert f'"{name.removesuffix("NAME")}' in inspect.getsource(where), name
    for name in evaluate.METRICS:
        help_text = (ROOT / "launch" / "evaluate.py").read_text()
        assert re.search(rf"^  (\w+, )?{name}\b", help_text, re.MULTILINE), name
    row = dict.fromkeys(glossary[0] - {"sample_accuracy"}, 0.5)
    table = evaluate.table([row | {"average": "", "guidance_scale": 1.0}])
    assert {*table.splitlines()[0].split()} == row.keys() - {"samples_per_second"}
