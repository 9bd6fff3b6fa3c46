"""The comparison page: what it says, and what a browser makes of it."""

import base64
import html.parser
import re
import shutil
import subprocess
from xml.etree import ElementTree

import cases
import numpy as np
import pytest
import tiny
from commands import call

from mclr_jax.evaluation import report

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
    return report.Column(**options | changes)


def test_the_page_holds_the_curves_metrics_samples_and_differences():
    other = made("b", config={"seed": 0, "optimizer.learning_rate": 5e-4, "new": 1})
    text = report.page([made("a"), other])
    page = Page(text)
    curves = charts(text)
    assert [len(lines) for _, lines in curves] == [2, 2]  # two runs in each of two charts
    assert curves[0][0] == (
        "loss over training steps; run a: 0.5 at step 20; run b: 0.5 at step 20"
    )
    pictures = [picture for picture in page.all("img") if "data-scale" in picture]
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


def charts(text):
    """The charts of a page: what is said of each in words, and the points (n, 2) of its lines."""
    found = []
    for attrs in Page(text).all("img"):
        kind, _, data = attrs["src"].partition(";base64,")
        if kind == "data:image/svg+xml":
            svg = ElementTree.fromstring(base64.b64decode(data))
            paths = [path.attrib for path in svg.iter("{http://www.w3.org/2000/svg}path")]
            thick = [path for path in paths if "stroke-width: 1.5" in path.get("style", "")]
            lines = [path["d"] for path in thick if "clip-path" in path]  # not in the legend
            points = [np.array(re.findall(r"[\d.]+", line), float) for line in lines]
            found.append((attrs["alt"], [line.reshape(-1, 2) for line in points]))
    return found


def test_points_lie_where_their_values_are():
    def drawn(values, steps=(0, 50, 100)):
        run = made("a", curves={"loss": (list(steps), values)})
        ((_, (line,)),) = charts(report.page([run]))
        x, y = ((line - line.min(0)) / np.ptp(line, axis=0)).T
        return x, 1 - y  # SVG counts downwards

    x, y = drawn([2.0, 1.0, 4.0])
    np.testing.assert_allclose(x, [0, 1 / 2, 1], atol=1e-4)
    np.testing.assert_allclose(y, [1 / 3, 0, 1], atol=1e-4)
    # values that span more than a factor of 100: the axis is logarithmic
    _, y = drawn([1e-3, 1e-1, 10.0])
    np.testing.assert_allclose(y, [0, 1 / 2, 1], atol=1e-4)
    x, y = drawn([1.0, float("nan"), 3.0, 2.0], [0, 1, 2, 4])  # what is not finite is left out
    np.testing.assert_allclose([*x, *y], [0, 1 / 2, 1, 0, 1, 1 / 2], atol=1e-4)


def test_odd_names_and_curves_are_drawn():
    odd = {"loss": ([0, 1], [float("nan"), 3.0]), "none": ([5], [float("inf")]), "one": ([], [])}
    found = charts(report.page([made("_a$b", curves=odd), made('"<c>$', curves=odd)]))
    assert [alt.count("no finite value") for alt, _ in found] == [0, 2, 2]
    assert found[0][0].endswith('run _a$b: 3 at step 1; run "<c>$: 3 at step 1')


def test_runs_of_one_name_are_told_apart_and_empty_ones_say_so():
    text = report.page([made("a", rows=[], grids={}, curves={}), made("a", rows=[], grids={})])
    assert "a (2)" in text
    assert [alt.partition("; ")[2] for alt, _ in charts(text)] == [
        "run a (2): 0.5 at step 20", "run a (2): 1 at step 20"
    ]  # fmt: skip
    assert "No run was evaluated yet" in text
    assert "No samples were asked for" in text


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    """A killed process leaves half a line; other programs may have written what is no number."""
    tiny.describe(tmp_path, given=tiny.config("digits"))
    lines = ['{"step": 1, "loss": 2.0, "note": "x", "none": null}', "[3]", '"step"', "\xff",
             '{"loss": 9.0}', '{"step": 2, "loss": NaN}', "", '{"step": 3, "los']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    run = report.read(tmp_path)
    np.testing.assert_equal(run.curves, {"loss": ([1, 2], [2.0, np.nan])})
    assert run.config["num_steps"] == 12
    assert len(charts(report.page([run]))) == 1


def test_a_classifier_is_shown_without_samples(tmp_path):
    tiny.describe(tmp_path, given=tiny.classifier("digits"))
    assert report.read(tmp_path, guidance_scales=[1.0]).grids == {}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two runs, by the command."""
    folder = tmp_path_factory.mktemp("report")
    cases.untrained(folder / "a", tiny.config("digits"))
    lines = ['{"step": 4, "loss": 2.0}', '{"step": 8, "loss": 1.5}']
    (folder / "a" / "metrics.jsonl").write_text("\n".join(lines))
    shutil.copytree(folder / "a", folder / "b")
    out = folder / "deep" / "report.html"
    log = call("report", str(folder / "a"), str(folder / "b"), f"--out={out}",
               "--guidance_scales=1,2", "--per_class=2")  # fmt: skip
    assert f"Wrote {out}." in log
    return out


def test_the_command_writes_a_page_of_real_runs(written):
    page = Page(written.read_text())
    assert len([picture for picture in page.all("img") if "data-scale" in picture]) == 4
    ((words, _),) = charts(written.read_text())
    assert words == "loss over training steps; run a: 1.5 at step 8; run b: 1.5 at step 8"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_slider_changes_the_pictures_in_a_browser(written, tmp_path):
    move = "slider.value = 1; slider.dispatchEvent(new Event('input'));"
    path = tmp_path / "page.html"
    path.write_text(written.read_text().replace("</body>", f"<script>{move}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
               "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
               "--dump-dom", path.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    page = Page(dom.replace("<!DOCTYPE html>", ""))
    pictures = [a for a in page.all("img") if "data-scale" in a]
    assert [a["data-scale"] for a in pictures if "hidden" not in a] == ["2", "2"]
    assert page.all("input")[0]["aria-valuetext"] == "2"


def test_a_command_without_runs_is_explained(tmp_path):
    assert "No run was named" in call("report", f"--out={tmp_path / 'x.html'}", expect=2)
