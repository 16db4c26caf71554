"""What a real Chromium draws of a report, by its pixels, its geometry and its own words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from megallama.cli import app
from megallama.run_dir.events import METRICS
from tests.report.chromium import Page, chromium
from tests.report.written import PARTS, long_run, plain_run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(chromium() is None, reason="no Chromium; `make test-peers` unpacks Debian's where there is one"),
]

STEPS = 10_000
HOSTILE = "<img src=x onerror=PWNED=1>'\"&amp;<!--"
CURVES = {
    "loss": ["train", "train, evaluated", "validation", "web"],
    "perplexity": ["train", "train, evaluated", "validation", "web"],
    "lr": ["learning rate"],
    "grad_norm": ["gradient norm"],
    "tokens_per_second": ["tokens/s"],
    "mfu": ["mfu, attention over the whole square", "mfu_causal, over the positions seen"],
    "breakdown": [name for name in PARTS if name != "context"],
    "memory": ["measured, rank 0", "predicted, fullest rank"],
}
KINDS = {
    "resume": "restart",
    "rollback": "rollback",
    "rewind": "rewind",
    "skip": "skipped step",
    "straggler": "straggler",
    "checkpoint": "checkpoint",
    "checkpoint_failed": "failed save",
}
LOOK = """
(() => {
  const box = (each) => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  return [...document.querySelectorAll("figure")].map((figure) => ({
    key: figure.dataset.key,
    figure: box(figure),
    area: box(figure.querySelector("svg rect[fill=transparent]")),
    texts: [...figure.querySelectorAll(":scope > svg text")].map((t) => ({ text: t.textContent, box: box(t) })),
    names: [...figure.querySelectorAll(".names > *")].map((n) => ({ text: n.textContent, box: box(n),
      colour: getComputedStyle(n.querySelector("path")).stroke })),
    curves: [...figure.querySelectorAll(":scope > svg path.curve")].map((p) => ({
      name: p.dataset.name, run: p.dataset.run, box: box(p), d: p.getAttribute("d"),
      colour: getComputedStyle(p).stroke, dash: getComputedStyle(p).strokeDasharray })),
    marks: [...figure.querySelectorAll(":scope > svg path.mark")].map((p) => ({
      kind: p.dataset.kind, run: p.dataset.run, box: box(p), colour: getComputedStyle(p).stroke })),
    returns: figure.querySelectorAll(":scope > svg line.return").length,
  }));
})()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one.html` of a long run; `two.html` of it and of a short one with a name that would be a script."""
    folder = tmp_path_factory.mktemp("reports")
    long, other = long_run(folder / "long", STEPS), plain_run(folder / HOSTILE, 2000)
    for name, runs in (("one", [long]), ("two", [long, other])):
        words = ["report", *map(str, runs), "--output", str(folder / f"{name}.html")]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = chromium()
    assert program is not None
    with Page(program, 1280, 2600) as page:
        yield page


@pytest.fixture
def one(browser: Page, reports: Path) -> Page:
    browser.prefer("light")
    browser.open(reports / "one.html")
    return browser


@pytest.fixture
def two(browser: Page, reports: Path) -> Page:
    browser.prefer("light")
    browser.open(reports / "two.html")
    return browser


def look(page: Page) -> dict[str, Any]:
    """The figures of the page by their key: what is drawn in them, and where."""
    return {figure["key"]: figure for figure in page.run(LOOK)}


def written(reports: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (reports / "long" / METRICS).read_text().splitlines()]


def inside(inner: list[float], outer: list[float], slack: float = 3.0) -> bool:
    left, top, right, bottom = inner
    return (
        left >= outer[0] - slack
        and top >= outer[1] - slack
        and right <= outer[2] + slack
        and bottom <= outer[3] + slack
    )


def painted(page: Page, box: list[float], colour: str) -> int:
    """Pixels of a part of the window that have about this colour."""
    page.screenshot(page.folder / "seen.png")
    left, top, right, bottom = (round(edge) for edge in box)
    pixels = imread(BytesIO((page.folder / "seen.png").read_bytes()))[top:bottom, left:right, :3] * 255
    wanted = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]])
    return int((np.abs(pixels - wanted).max(axis=2) < 40).sum())


def test_every_curve_is_visible_and_inside_its_plot(one: Page) -> None:
    figures = look(one)
    assert [key for key in figures if key != "history"] == list(CURVES)
    for key, names in CURVES.items():
        figure = figures[key]
        assert [curve["name"] for curve in figure["curves"]] == names
        for curve in figure["curves"]:
            assert inside(curve["box"], figure["area"]), (key, curve["name"], curve["box"], figure["area"])
            assert curve["box"][2] - curve["box"][0] > 0.9 * (figure["area"][2] - figure["area"][0]) - 8
            assert painted(one, figure["area"], curve["colour"]) > 50, (key, curve["name"])
        assert len({curve["colour"] for curve in figure["curves"]}) == len(names)
        assert figure["returns"] == 5  # restarts, the rollback and the rewind


def test_every_curve_and_mark_has_its_name(one: Page) -> None:
    figures = look(one)
    for key, names in CURVES.items():
        assert [name["text"] for name in figures[key]["names"]] == names
        colours = {curve["name"]: curve["colour"] for curve in figures[key]["curves"]}
        assert {name["text"]: name["colour"] for name in figures[key]["names"]} == colours
    entries = [name["text"] for name in figures["history"]["names"]]
    assert [entry.rpartition(" (")[0] for entry in entries] == list(KINDS.values())
    for figure in figures.values():
        for name in figure["names"]:
            assert inside(name["box"], figure["figure"])
            assert painted(one, name["box"], name["colour"]) > 4, name["text"]
        for text in figure["texts"]:
            assert inside(text["box"], figure["figure"]), text


def test_every_mark_is_visible_where_it_happened(one: Page, reports: Path) -> None:
    history = look(one)["history"]
    happened = [event for event in written(reports) if event["event"] in KINDS]
    assert Counter(m["kind"] for m in history["marks"]) == Counter(event["event"] for event in happened)
    left, _, right, _ = history["area"]
    for kind in KINDS:
        steps = sorted(event["step"] for event in happened if event["event"] == kind)
        drawn = sorted((mark["box"][0] + mark["box"][2]) / 2 for mark in history["marks"] if mark["kind"] == kind)
        for step, x in zip(steps, drawn, strict=True):
            assert x == pytest.approx(left + 4 + step / STEPS * (right - left - 8), abs=6), (kind, step)
    for mark in history["marks"]:
        assert inside(mark["box"], history["area"], slack=6)
        assert painted(
            one, [round(mark["box"][0]) - 2, mark["box"][1], mark["box"][2] + 2, mark["box"][3]], mark["colour"]
        )


def test_the_axis_is_switched(one: Page) -> None:
    seen = {}
    for axis in ("steps", "tokens", "hours"):
        one.run(f"document.querySelector('input[value={axis}]').click()")
        one.settle()
        seen[axis] = figures = look(one)
        for figure in figures.values():
            assert all(inside(curve["box"], figure["area"]) for curve in figure["curves"])
    ends = {axis: bottom_texts(figures["loss"])[-1] for axis, figures in seen.items()}
    assert ends == {"steps": "10K", "tokens": "10M", "hours": "4"}
    # A restart that was waited for takes no steps, but an hour.
    assert seen["hours"]["loss"]["curves"][0]["d"] != seen["steps"]["loss"]["curves"][0]["d"]


def bottom_texts(figure: dict[str, Any]) -> list[str]:
    lowest = max(text["box"][3] for text in figure["texts"])
    return [text["text"] for text in figure["texts"] if text["box"][3] > lowest - 2]


def test_hovering_shows_the_numbers_of_the_file(one: Page, reports: Path) -> None:
    train = {event["step"]: event for event in written(reports) if event["event"] == "train"}
    evaluated = {(e["step"], e["split"]): e for e in written(reports) if e["event"] == "eval"}
    figures = look(one)
    for key, names in CURVES.items():
        left, top, right, bottom = figures[key]["area"]
        one.move(left + 0.37 * (right - left), (top + bottom) / 2)
        rows = one.run("[...document.querySelectorAll('#tip tr')].map((r) => [...r.cells].map((c) => c.textContent))")
        assert [row[0] for row in rows] == names
        for name, value, where in rows:
            step = int(where.removeprefix("step ").replace(",", ""))
            number = float(value.split()[0].replace(",", ""))
            if name == "predicted, fullest rank":
                assert number == 3
                continue
            split = {"train, evaluated": "train"}.get(name, name)
            told = evaluated[step, split] if key in ("loss", "perplexity") and name != "train" else train[step]
            expected = {
                "perplexity": lambda told=told: told.get("perplexity", np.exp(told["loss"])),
                "mfu": lambda told=told, name=name: 100 * told["mfu_causal" if "causal" in name else "mfu"],
                "breakdown": lambda told=told, name=name: told["breakdown"][name],
                "memory": lambda told=told: told["peak_memory_bytes"] / 2**30,
            }.get(key, lambda told=told, key=key: told[key])()
            assert number == float(f"{expected:.7g}"), (key, name, step)
            if name not in ("train, evaluated", "validation", "web", "predicted, fullest rank"):
                assert step == pytest.approx(0.37 * STEPS, abs=STEPS / 100)


def test_marks_tell_what_happened(one: Page) -> None:
    failed = next(mark for mark in look(one)["history"]["marks"] if mark["kind"] == "checkpoint_failed")
    one.move((failed["box"][0] + failed["box"][2]) / 2, (failed["box"][1] + failed["box"][3]) / 2)
    assert "failed save, step 1200: no space" in one.run("document.getElementById('tip').textContent")


def test_a_straggler_and_the_slowest_ranks_are_named(one: Page) -> None:
    of_one, _ = (mark for mark in look(one)["history"]["marks"] if mark["kind"] == "straggler")
    one.move((of_one["box"][0] + of_one["box"][2]) / 2, (of_one["box"][1] + of_one["box"][3]) / 2)
    said = one.run("document.getElementById('tip').textContent")
    for rank, seconds in ((3, 0.15), (1, 0.13)):
        assert f"straggler, step 4000: rank {rank} on node7, {seconds} s a step behind, 25% of a step" in said
    titles = one.run("[...document.querySelectorAll('#facts h2')].map((each) => each.textContent)")
    assert titles == ["Runs", "Slowest ranks"]
    heads = one.run("[...document.querySelectorAll('#facts table:last-of-type tbody th')].map((h) => h.textContent)")
    assert heads[-2:] == ["rank 3 on node7", "rank 1 on node7"]


def test_a_drag_narrows_all_plots_and_a_double_click_widens_them(one: Page) -> None:
    before = look(one)
    left, top, right, bottom = before["loss"]["area"]
    middle = (top + bottom) / 2
    one.drag((left + 0.4 * (right - left), middle), (left + 0.6 * (right - left), middle))
    zoomed = look(one)
    for key, figure in zoomed.items():
        shown = [float(text) for text in bottom_texts(figure)]
        assert 3900 < min(shown) < max(shown) < 6100, key
        assert len(shown) > 1
    assert zoomed["loss"]["curves"][0]["d"] != before["loss"]["curves"][0]["d"]
    assert {t["text"] for t in zoomed["loss"]["texts"]} != {t["text"] for t in before["loss"]["texts"]}
    # What is outside of the plot is not painted.
    one.move(2, 2)  # the numbers under the pointer would cover it
    outside = [zoomed["loss"]["area"][2] + 4, top, zoomed["loss"]["figure"][2] - 1, bottom]
    assert painted(one, outside, zoomed["loss"]["curves"][0]["colour"]) == 0
    one.click((left + right) / 2, middle, count=2)
    assert look(one)["loss"]["curves"][0]["d"] == before["loss"]["curves"][0]["d"]


def test_a_name_hides_its_curve(one: Page) -> None:
    entry = next(name for name in look(one)["loss"]["names"] if name["text"] == "validation")
    at = (entry["box"][0] + entry["box"][2]) / 2, (entry["box"][1] + entry["box"][3]) / 2
    one.click(*at)
    assert [curve["name"] for curve in look(one)["loss"]["curves"]] == ["train", "train, evaluated", "web"]
    one.click(*at)
    assert [curve["name"] for curve in look(one)["loss"]["curves"]] == CURVES["loss"]


@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_is_asked_of_the_network_and_nothing_fails(name: str, browser: Page, reports: Path) -> None:
    browser.open(reports / f"{name}.html")
    asked = [request["request"]["url"] for request in browser.told("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [(reports / f"{name}.html").as_uri()]
    for trouble in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
        assert browser.told(trouble) == []


def test_dark_and_light_differ(one: Page) -> None:
    def colours() -> tuple[float, list[str]]:
        page = one.run("getComputedStyle(document.body).backgroundColor")
        brightness = sum(float(part) for part in re.findall(r"[\d.]+", page)[:3]) / 3 / 255
        return brightness, [curve["colour"] for figure in look(one).values() for curve in figure["curves"]]

    light, light_curves = colours()
    one.prefer("dark")
    dark, dark_curves = colours()
    assert light > 0.9 and dark < 0.15
    assert all(a != b for a, b in zip(light_curves, dark_curves, strict=True))
    for figure in look(one).values():
        for curve in figure["curves"]:
            assert painted(one, figure["area"], curve["colour"]) > 50


def test_runs_are_drawn_together_under_their_names(two: Page) -> None:
    figures = look(two)
    for key, names in CURVES.items():
        of_the_other = [n for n in names if n not in ("train, evaluated", "web", "predicted, fullest rank")]
        drawn = [(curve["run"], curve["name"]) for curve in figures[key]["curves"]]
        assert drawn == [*(("long", n) for n in names), *((HOSTILE, n) for n in of_the_other)]
        assert [n["text"] for n in figures[key]["names"]] == [f"{run}: {name}" for run, name in drawn]
        assert all(inside(curve["box"], figures[key]["area"]) for curve in figures[key]["curves"])
        looks = [(curve["colour"], curve["dash"]) for curve in figures[key]["curves"]]
        assert len(set(looks)) == len(looks), key
    assert {mark["run"] for mark in figures["history"]["marks"]} == {"long", HOSTILE}


def test_a_name_is_text_and_nothing_else(two: Page) -> None:
    assert two.run("[document.images.length, typeof PWNED, document.querySelector('h1').textContent]") == [
        0,
        "undefined",
        f"long, {HOSTILE}",
    ]
