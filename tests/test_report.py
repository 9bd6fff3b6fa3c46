"""The comparison page: what it says, and what a browser makes of it."""

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest
import tiny
from test_launch import call

from mclr_jax import experiment, runs
from mclr_jax.data import sources
from mclr_jax.evaluation import report
from mclr_jax.main import train

CHROMIUM = shutil.which("chromium")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def made(name, **changes):
    options = {
        "name": name,
        "config": {"seed": 0, "optimizer.learning_rate": 1e-3},
        "curves": {"loss": ([0, 10, 20], [3.0, 1.0, 0.5]), "x<y": ([0, 20], [1.0, 1.0])},
        "rows": [{"step": 20, "average": "", "guidance_scale": 1.0, "frechet": 0.25, "seed": 0}],
        "grids": {1.0: b"one", 2.0: b"two"},
    }
    return report.Run(**options | changes)


def test_the_page_holds_the_curves_metrics_samples_and_differences():
    other = made("b", config={"seed": 0, "optimizer.learning_rate": 5e-4, "new": 1})
    text = report.page([made("a"), other])
    page = Page(text)
    assert len(page.all("polyline")) == 4  # two runs in each of two charts
    pictures = page.all("img")
    assert [p["data-scale"] for p in pictures] == ["1", "2", "1", "2"]
    assert [("hidden" in p) for p in pictures] == [False, True, False, True]
    assert all(p["src"].startswith("data:image/png;base64,") and p["alt"] for p in pictures)
    assert "0.25" in text
    before, _, every = text.partition("<summary>All keys</summary>")
    assert "optimizer.learning_rate" in before
    assert "not set" in before
    assert ">seed<" not in before
    assert ">seed<" in every
    assert "x&lt;y" in text
    assert not re.search(r"(src|href)=.(https?:|//)", text)  # nothing from the network


def test_points_lie_where_their_values_are():
    text = report.chart("loss", {"a": ([0, 50, 100], [2.0, 1.0, 4.0])})
    (places,) = re.findall(r'points="(.*?)"', text)
    x, y = np.array([p.split(",") for p in places.split()], float).T
    left, right = report.LEFT, report.WIDTH - report.RIGHT
    np.testing.assert_allclose(x, [left, (left + right) / 2, right], atol=0.1)
    top, bottom = report.TOP, report.HEIGHT - report.BOTTOM
    np.testing.assert_allclose(y, [bottom - (bottom - top) / 3, bottom, top], atol=0.1)
    # values that span more than a factor of 100: the axis is logarithmic
    text = report.chart("loss", {"a": ([0, 1, 2], [1e-3, 1e-1, 10.0])})
    (places,) = re.findall(r'points="(.*?)"', text)
    _, y = np.array([p.split(",") for p in places.split()], float).T
    np.testing.assert_allclose(y, [bottom, (bottom + top) / 2, top], atol=0.1)
    report.chart("odd", {"a": ([0, 1], [float("nan"), 3.0]), "b": ([], [])})


def test_runs_of_one_name_are_told_apart_and_empty_ones_say_so():
    text = report.page([made("a", rows=[], grids={}, curves={}), made("a", rows=[], grids={})])
    assert "a (2)" in text
    assert "No run was evaluated yet" in text
    assert "No samples were asked for" in text


def described(config, workdir):
    """The directory of a run that has not begun."""
    data = experiment.data_info(config, sources.load("digits"))
    runs.describe(workdir, config, experiment.make_model(config, data), {})


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    """A killed process leaves half a line; other programs may have written what is no number."""
    described(tiny.config("digits"), tmp_path)
    lines = ['{"step": 1, "loss": 2.0, "note": "x", "none": null}', "[3]", '"step"', "\xff",
             '{"loss": 9.0}', '{"step": 2, "loss": NaN}', "", '{"step": 3, "los']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    run = report.read(tmp_path)
    np.testing.assert_equal(run.curves, {"loss": ([1, 2], [2.0, np.nan])})
    assert len(Page(report.page([run])).all("polyline")) == 1


def test_a_classifier_is_shown_without_samples(tmp_path):
    described(tiny.classifier("digits"), tmp_path)
    assert report.read(tmp_path, guidance_scales=[1.0]).grids == {}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two runs, by the command."""
    folder = tmp_path_factory.mktemp("report")
    train(tiny.config("digits"), folder / "a")
    train(tiny.config("digits", num_steps=6), folder / "b")
    out = folder / "deep" / "report.html"
    log = call("report", str(folder / "a"), str(folder / "b"), f"--out={out}",
               "--guidance_scales=1,2", "--per_class=2")  # fmt: skip
    assert f"Wrote {out}." in log
    return out


def test_the_command_writes_a_page_of_real_runs(written):
    page = Page(written.read_text())
    assert len(page.all("img")) == 4
    assert "num_steps" in written.read_text().partition("<summary>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_slider_changes_the_pictures_in_a_browser(written, tmp_path):
    def shown(script):
        path = tmp_path / "page.html"
        path.write_text(written.read_text().replace("</body>", f"<script>{script}</script></body>"))
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                   "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
                   "--dump-dom", path.as_uri()]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        page = Page(dom.replace("<!DOCTYPE html>", ""))
        slider = next(a for a in page.all("input"))
        return [a["data-scale"] for a in page.all("img") if "hidden" not in a], slider

    visible, slider = shown("")
    assert visible == ["1", "1"]
    assert slider["aria-valuetext"] == "1"
    move = "slider.value = 1; slider.dispatchEvent(new Event('input'));"
    visible, slider = shown(move)
    assert visible == ["2", "2"]
    assert slider["aria-valuetext"] == "2"


def test_a_command_without_runs_is_explained(tmp_path):
    assert "No run was named" in call("report", f"--out={tmp_path / 'x.html'}", expect=2)
