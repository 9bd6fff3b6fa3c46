"""The comparison page: what it says, and what a browser makes of it."""

import html.parser
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace
from xml.etree import ElementTree

import cases
import numpy as np
import pytest
import tiny
from commands import call
from test_docs import ROOT

from mclr_jax import latents, sampling
from mclr_jax.evaluation import report

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, whether they are closed in order, and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tables = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & {*self.open}:
            self.tables[-1][-1][-1] = f"{self.tables[-1][-1][-1]} {data}".strip()

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


ROW = {"step": 20, "average": "", "guidance_scale": 1.0, "seed": 0, "accuracy": 0.5,
       "network_calls": 3, "frechet": 0.25, "guidance_interval": None, "features": "z"}  # fmt: skip


def made(name, **changes):
    options = {
        "name": name,
        "config": {"seed": 0, "optimizer.learning_rate": 1e-3, "objective.name": "dsm"},
        "curves": {"loss": ([0, 10, 20], [3.0, 1.0, 0.5]), "error": ([0, 20], [1.0, 1.0])},
        "rows": [ROW],
        "grids": dict.fromkeys((1.0, 2.0), np.zeros((2 * 12 + 4, 3 * 12 + 4, 3), np.uint8)),
        "classes": ("cat", "<dog>"),
    }
    return report.Column(**options | changes)


def test_the_page_holds_the_curves_metrics_samples_and_differences():
    other = made("b", config={"seed": 0, "optimizer.learning_rate": 5e-4, "new": 1})
    text = report.page([made("a"), other])
    page = Page(text)
    curves = charts_of(text)
    assert [words for words, _ in curves] == [
        "loss of dsm ↓; run a: 0.5 at step 20",  # the objective of b is not known
        "loss ↓; run b: 0.5 at step 20",
        "error ↓; run a: 1 at step 20; run b: 1 at step 20",
    ]
    assert [[*lines] for _, lines in curves] == [["0"], ["1"], ["0", "1"]]
    assert all(p["src"].startswith("data:image/png;base64,") and p["alt"] for p in page.all("img"))
    before, _, every = text.partition("<summary>All keys</summary>")
    assert "optimizer.learning_rate" in before
    assert "not set" in before
    assert ">seed<" not in before
    assert ">seed<" in every
    assert not re.search(r"(src|href)=.(https?:|//)|@import|<script|<link", text)  # one file


def charts_of(text):
    """What is said of each chart in words, and the points (n, 2) of its lines by their run."""
    found = []
    for svg in re.findall("<svg.*?</svg>", text, re.DOTALL):
        tree, lines = ElementTree.fromstring(svg), {}
        for group in tree.iterfind(".//*[@data-run]"):
            path = group.find("{http://www.w3.org/2000/svg}path").attrib["d"]
            points = np.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2)
            lines[group.attrib["data-run"]] = points
        found.append((tree.attrib["aria-label"], lines))
    return found


def test_points_lie_where_their_values_are():
    def drawn(values, steps=(0, 50, 100)):
        run = made("a", curves={"loss": (list(steps), values)})
        ((_, lines),) = charts_of(report.page([run]))
        x, y = ((lines["0"] - lines["0"].min(0)) / np.ptp(lines["0"], axis=0)).T
        return x, 1 - y  # SVG counts downwards

    x, y = drawn([2.0, 1.0, 4.0])
    np.testing.assert_allclose(x, [0, 1 / 2, 1], atol=1e-4)
    np.testing.assert_allclose(y, [1 / 3, 0, 1], atol=1e-4)
    # values that span more than a factor of 100: the axis is logarithmic
    _, y = drawn([1e-3, 1e-1, 10.0])
    np.testing.assert_allclose(y, [0, 1 / 2, 1], atol=1e-4)
    x, y = drawn([1.0, float("nan"), 3.0, 2.0], [0, 1, 2, 4])  # what is not finite is left out
    np.testing.assert_allclose([*x, *y], [0, 1 / 2, 1, 0, 1, 1 / 2], atol=1e-4)


def test_no_chart_has_one_point():
    """What was logged once is told in words."""
    odd = {"loss": ([0, 1], [float("nan"), 3.0]), "none": ([5], [float("inf")]), "one": ([], [])}
    text = report.page([made("_a$b", curves=odd), made('"<c>$', curves=odd)])
    assert charts_of(text) == []
    assert "<small>3 at step 1</small>" in text
    assert text.count("<small>no finite value</small>") == 4
    both = [made("a", curves=odd), made("b", curves={"loss": ([0, 1], [1.0, 2.0])})]
    ((words, lines),) = charts_of(report.page(both))
    assert words == "loss of dsm ↓; run a: 3 at step 1; run b: 2 at step 1"
    assert [len(points) for points in lines.values()] == [1, 2]


def test_a_warning_of_memorization_is_marked_where_it_came():
    """Between the points at 0 and 10, in the colour of the run; and told in words."""
    curves = {"memorization_gap": ([0, 5, 10], [0.0, 0.5, 1.0]), "loss": ([0, 10], [1.0, 0.5]),
              "memorization_warning": ([0, 5, 10], [0.0, 1.0, 2.0])}  # fmt: skip
    text = report.page([made("a", curves=curves)])
    of_loss, of_gap = re.findall("<svg.*?</svg>", text, re.DOTALL)[:2]
    assert "run a: 1 at step 10, warning at step 5" in of_gap
    line, mark = (
        np.array(re.findall(r"[\d.]+", path), float).reshape(-1, 2)
        for path in re.findall(r'<g data-run="0">\s*<path d="(.*?)"', of_gap, re.DOTALL)
    )
    np.testing.assert_allclose(mark[:, 0], line[1, 0], atol=0.01)
    assert np.ptp(mark[:, 1]) > np.ptp(line[:, 1])  # over the whole height
    assert of_loss.count("data-run") == 1


def test_losses_of_different_objectives_are_apart():
    steps = [0, 1], [2.0, 1.0]
    curves = {"loss": steps, "eval_loss": steps, "error": steps, "grad_norm": steps}
    objectives = "dsm", "mclr", "dsm"
    runs = [made(name, curves=curves, config={"objective.name": name}) for name in objectives]
    text = report.page(runs)
    assert [(words.partition(" ↓")[0].partition(";")[0], "".join(lines))
            for words, lines in charts_of(text)] == [
        ("loss of dsm", "02"), ("eval_loss of dsm", "02"), ("loss of mclr", "1"),
        ("eval_loss of mclr", "1"), ("error", "012"), ("grad_norm", "012"),
    ]  # fmt: skip
    assert "grad_norm" not in text.partition("<summary>Curves for diagnosis</summary>")[0]


def test_the_table_has_distance_and_accuracy_first_and_no_empty_column():
    floor = {"samples": 90, "accuracy": 0.9, "frechet": 0.1}
    rows = [ROW | {"samples": 100, "floor": floor}, ROW | {"samples": 100, "guidance_scale": 2.0}]
    other = ROW | {"samples": 50, "average": "power_0.05", "interpolation": 0.5, "floor": floor}
    page = Page(report.page([made("a", rows=rows), made("b", rows=[other])]))
    assert page.tables[0] == [
        ["run", "frechet ↓", "accuracy ↑", "network_calls ↓", "samples"],
        ["real, held out", "0.1", "0.9", "", "90"],
        ["a scale 1", "0.25", "0.5", "3", "100"],
        ["a scale 2", "0.25", "0.5", "3", "100"],
        ["b power_0.05 scale 1 interpolation 0.5", "0.25", "0.5", "3", "50"],
    ]
    text = report.page([made("a", rows=rows)])
    assert Page(text).tables[0][0] == ["run", "frechet ↓", "accuracy ↑", "network_calls ↓"]
    assert "All rows: step 20, samples 100, features z. Frechet distances" in text
    assert "100, of the floor 90" in text
    two = [ROW | {"features": x, "floor": floor} for x in "xy"]
    assert [row[-1] for row in Page(report.page([made("a", rows=two)])).tables[0]] == [
        "features", "x", "y", "x", "y"
    ]  # fmt: skip


def test_the_arrows_are_those_of_the_glossary():
    rows = re.findall(
        r"^\| (`[^|]*) \| ([↓↑]?) ?\|", (ROOT / "docs/evaluation.md").read_text(), re.M
    )
    told = {name: arrow for names, arrow in rows for name in re.findall(r"`(\w+)`", names) if arrow}
    assert told == report.BETTER


def test_a_run_has_one_colour_everywhere():
    runs = [made(f"run{i}") for i in range(3)]
    page = Page(report.page(runs))
    marks = [attrs["style"] for attrs in page.all("span")]
    assert len({*marks}) == 3
    assert len(marks) == 3 * 6  # switch, row, samples, two charts, one table of configs
    by_run = [[x["data-run"] for x in page.all(tag) if "data-run" in x] for tag in ("tr", "figure")]
    assert by_run == [["0", "1", "2"]] * 2
    for svg in re.findall("<svg.*?</svg>", report.page(runs), re.DOTALL):
        for group in ElementTree.fromstring(svg).iterfind(".//*[@data-run]"):
            colour, _ = report.look(int(group.attrib["data-run"]))
            drawn = {x.attrib["style"] for x in group.iter() if "stroke:" in x.get("style", "")}
            assert drawn
            assert all(f"stroke: {colour}" in style for style in drawn)
    assert len({report.look(number) for number in range(18)}) == 18


def test_colours_are_seen_on_light_and_on_dark():
    """By the contrast that WCAG 2.2 asks for: 3 for lines, 4.5 for text."""

    def luminance(colour):
        parts = [int(part, 16) / 255 for part in re.findall("..", colour[1:].ljust(6, colour[-1]))]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    light, dark = report.PAGE.template.split("@media (prefers")
    for part in (light, dark):
        found = dict(re.findall(r"--([\w-]+): (#\w+);", part))
        names = ["text", "quiet", "link", *(f"run-{i}" for i in range(report.COLOURS))]
        for name in names:
            pair = sorted([luminance(found[name]), luminance(found["back"])])
            least = 3 if "run" in name else 4.5
            assert (pair[1] + 0.05) / (pair[0] + 0.05) > least, (name, found[name])


def test_pictures_are_enlarged_by_whole_numbers_beside_the_names_of_their_rows():
    """Of samples of 8 pixels, the picture has 12 a row and 4 more: seven times is 56 a sample."""
    text = report.page([made("a")])
    page = Page(text)
    assert [picture["width"] for picture in page.all("img")] == [str(7 * 40)] * 2
    assert "<li>cat</li><li>&lt;dog&gt;</li>" in text
    assert "--half: 14px" in text  # half of the margin of 4, enlarged
    assert "image-rendering: pixelated" in text
    rules = re.sub(r"\s+", " ", text)
    assert "body:has(#scale-1:not(:checked)) [data-scale='2'] { display: none; }" in rules
    assert [(x["id"], "checked" in x) for x in page.all("input")] == [
        ("run-0", True), ("scale-0", True), ("scale-1", False)
    ]  # fmt: skip
    assert [x["data-scale"] for x in page.all("div") if "data-scale" in x] == ["1", "2"]


def test_runs_of_one_name_are_told_apart_and_empty_ones_say_so():
    text = report.page([made("a", rows=[], grids={}, curves={}), made("a", rows=[], grids={})])
    assert "a (2)" in text
    assert [words.partition("; ")[2] for words, _ in charts_of(text)] == [
        "run a (2): 0.5 at step 20", "run a (2): 1 at step 20"
    ]  # fmt: skip
    assert "No run was evaluated yet" in text
    assert "No samples were asked for" in text


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    """A killed process leaves half a line; other programs may have written what is no number."""
    tiny.describe(tmp_path, given=tiny.config("digits"))
    lines = ['{"step": 1, "loss": 2.0, "note": "x", "none": null}', "[3]", '"step"', "\xff",
             '{"loss": 9.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": 1}', "",
             '{"step": 4, "los']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    run = report.read(tmp_path)
    np.testing.assert_equal(run.curves, {"loss": ([1, 2, 3], [2.0, np.nan, 1.0])})
    assert run.config["num_steps"] == 12
    assert len(charts_of(report.page([run]))) == 1


@pytest.mark.parametrize(
    ("shape", "shown", "picture", "classes", "note"),
    [
        ((8, 8, 3), True, (2 * 44 + 4, 3 * 44 + 4, 3), ("cat", "1"), ""),
        ((2,), True, (480, 480, 3), (), ""),
        ((5, 3), True, (6, 5), (), ""),  # the first coordinate of trajectories
        ((5, 8, 8, 1), True, (2 * 44 + 4, 3 * 44 + 4, 3), ("cat", "1"), ""),  # three frames
        ((4, 4, 8), False, None, ("cat", "1"), latents.UNSEEN.format(8)),
    ],
)
def test_samples_of_each_kind_are_shown(
    shape, shown, picture, classes, note, tmp_path, monkeypatch
):
    samples = np.zeros((6, *shape), np.float32)
    drawn = samples, samples if shown else None
    model = SimpleNamespace(is_denoiser=True, null_label=2, data=SimpleNamespace(shape=shape))
    run = SimpleNamespace(model=model, class_names=("cat, a pet",), config={})
    monkeypatch.setattr(report, "load", lambda workdir: run)
    monkeypatch.setattr(sampling, "draw", lambda run, labels, guided: drawn)
    found = report.read(tmp_path / "a", [2.0], per_class=3)
    assert {scale: x.shape for scale, x in found.grids.items()} == (
        {2.0: picture} if picture else {}
    )
    assert (found.classes, found.note) == (classes, note)
    text = report.page([found])
    assert len(charts_of(text)) == (len(shape) == 2)
    assert (f"a: {html.escape(note)}" in text) == bool(note)


def test_a_classifier_is_shown_without_samples(tmp_path):
    tiny.describe(tmp_path, given=tiny.classifier("digits"))
    assert report.read(tmp_path, guidance_scales=[1.0]).grids == {}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two runs, by the command."""
    folder = tmp_path_factory.mktemp("report")
    cases.untrained(folder / "a", tiny.config("digits", **tiny.LINEAR))
    lines = ['{"step": 4, "loss": 2.0}', '{"step": 8, "loss": 1.5}']
    (folder / "a" / "metrics.jsonl").write_text("\n".join(lines))
    shutil.copytree(folder / "a", folder / "b")
    out = folder / "deep" / "report.html"
    log = call("report", str(folder / "a"), str(folder / "b"), f"--out={out}",
               "--guidance_scales=1,2", "--per_class=2")  # fmt: skip
    assert f"Wrote {out}." in log
    return out


def test_the_command_writes_a_page_of_real_runs(written):
    text = written.read_text()
    assert len(Page(text).all("img")) == 4
    ((words, _),) = charts_of(text)
    assert words == "loss of dsm ↓; run a: 1.5 at step 8; run b: 1.5 at step 8"
    assert len(text) < 60_000


class Browser:
    """A page in headless Chromium, by messages of the DevTools protocol through a pipe."""

    def __init__(self, page):
        there, back = os.pipe(), os.pipe()
        shell = f'exec "$@" 3<&{there[0]} 4>&{back[1]}'
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        command = ["bash", "-c", shell, "-", BROWSER, *options, "about:blank"]
        ends = {"pass_fds": (there[0], back[1]), "stderr": subprocess.DEVNULL}
        self.process, self.number = subprocess.Popen(command, **ends), 0
        os.close(there[0]), os.close(back[1])
        self.to, self.back, self.session = (
            os.fdopen(there[1], "wb", 0),
            os.fdopen(back[0], "rb"),
            {},
        )
        (target,) = self("Target.getTargets")["targetInfos"]
        attached = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self("Page.enable")
        self("Page.navigate", url=page.as_uri())
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def __call__(self, method, **params):
        self.number += 1
        given = {"id": self.number, "method": method, "params": params, **self.session}
        self.to.write(json.dumps(given).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            pass
        return answer["result"]

    def message(self):
        return json.loads(b"".join(iter(lambda: self.back.read(1), b"\0")))

    def value(self, script):
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"]["value"]

    def press(self, key, code, text=""):
        given = {"key": key, "code": key or "Space", "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, **given)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"none of {BROWSERS} on this machine")
def test_the_page_is_used_by_its_keys_in_a_browser(written):
    browser, seen = (
        Browser(written),
        "[...document.querySelectorAll('{}')].map(x => x.checkVisibility())",
    )
    try:
        for width in (1280, 375):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            browser("Emulation.setDeviceMetricsOverride", **size)
            assert browser.value("document.documentElement.scrollWidth") <= width
        colours = []
        for theme in ("light", "dark"):
            wanted = {"name": "prefers-color-scheme", "value": theme}
            browser("Emulation.setEmulatedMedia", features=[wanted])
            colours += [browser.value("getComputedStyle(document.body).backgroundColor")]
        assert colours == ["rgb(255, 255, 255)", "rgb(21, 24, 28)"]
        focus, reached = "document.activeElement.id || document.activeElement.tagName", []
        assert browser.value(seen.format("img")) == [True, False] * 2
        while (here := browser.value(focus)) != "SUMMARY":
            assert len(reached) < 20, reached
            if here == "run-0":
                browser.press(" ", 32, " ")
            if here == "scale-0":
                assert browser.value(seen.format("img")) == [False, False, True, False]
                browser.press("ArrowRight", 39)
                here = browser.value(focus)
            reached.append(here)
            browser.press("Tab", 9)
        assert reached == ["BODY", *"AAAA", "run-0", "run-1", "scale-1"]
        assert browser.value(seen.format("img")) == [False, False, False, True]
        lines = (
            "[...document.querySelectorAll('svg [data-run]')].map(x => getComputedStyle(x).display)"
        )
        assert browser.value(lines) == ["none", "inline"]
        browser.press("Enter", 13, "\r")
        assert browser.value("document.querySelector('details').open")
    finally:
        browser.process.kill()
        browser.process.wait()


def test_a_command_without_runs_is_explained(tmp_path):
    assert "No run was named" in call("report", f"--out={tmp_path / 'x.html'}", expect=2)
