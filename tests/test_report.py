"""The report and the saved results, from made-up figures: no training here."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from racecar.demo.curves import decades, panel, round_steps
from racecar.demo.images import grey_levels, signed_levels
from racecar.demo.remarks import remarks
from racecar.demo.report import render, write_report
from racecar.demo.results import (
    PHASES,
    Cost,
    Reconstruction,
    Results,
    ResultsError,
    Run,
    load_results,
    save_results,
)
from racecar.demo.terminal import results_table
from racecar.demo.text import accuracy_text


def made_up(seeds: int = 2, channels: int = 1):
    models = {"Std": "plain", "RR": "<both ways>"}
    results = Results(
        models=models,
        data={"name": "toys", "description": "toys: found 9 images & more", "notes": ["Limited to 9."]},
        settings={"lam": 0.1, "limit": None, "quick": False},
        versions={"torch": "2.13.0"},
        command="racecar demo --data '<toys>'",
        started="2026-01-01T00:00:00+00:00",
        seconds=12.0,
    )
    for m, model in enumerate(models):
        for seed in range(seeds):
            for phase in PHASES:
                reverse = [0.5, 0.1] if model == "RR" and phase == "I" else []
                results.runs.append(
                    Run(model, seed, phase, [1.0, 0.1], reverse, [0.5, 0.9 + 0.02 * m + 0.01 * seed], 1.0)
                )
        results.costs[model] = Cost(2.0 + m, 1.9, 2.1, 1.0 + m, 1000, 1.0 + 0.1 * m)
        results.reconstructions[model] = Reconstruction(0.9, 0.5, 0.4)
    rng = np.random.default_rng(0)
    names = ["input", "blurred", "reconstruction Std", "reconstruction RR", "modes data", "modes Std", "modes RR"]
    results.energy = {"Std": 0.2, "RR": 0.3, "data": 0.9}
    pictures = {name: rng.normal(size=(4, channels, 5, 6)).astype(np.float32) for name in names}
    return results, pictures


class Page(HTMLParser):
    """Collects tags, checks that they close, and every reference."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(("seeds", "channels"), [(2, 1), (1, 3)])
def test_page_is_whole_and_refers_to_nothing_outside(seeds, channels):
    text = render(*made_up(seeds, channels))
    page = Page(text)
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"https?:|@import|url\(|<script|\$\w", text)
    assert page.count["img"] == 4 * 6
    assert page.count["svg"] == 7
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_page_shows_figures_command_and_versions():
    text = render(*made_up())
    for part in (">.905 ± .007<", "<b>.925 ± .007</b>", "2.00 ×", "1.10 ×", "torch 2.13.0", "lam = 0.1"):
        assert part in text, part
    assert "racecar demo --data &#x27;&lt;toys&gt;&#x27;" in text
    assert "&lt;both ways&gt;" in text and "found 9 images &amp; more" in text
    assert "Limited to 9." in text
    assert "limit =" not in text and "quick =" not in text
    assert "Std: plain. RR: &lt;both ways&gt;." in text


def test_bold_only_where_the_ranges_do_not_overlap():
    assert render(*made_up()).count("<b>") == 3  # one in each phase
    assert "<b>" not in render(*made_up(seeds=1))
    assert "<b>" not in render(*made_up(seeds=4))  # .905 … .925 ± .013: the ranges overlap


def with_run(phase: str, classes: int = 10, **changes: object):
    results, _ = made_up()
    results.data["classes"] = [str(i) for i in range(classes)]
    results.settings["learning_rate"] = 0.5
    results.runs = [
        replace(r, **changes) if (r.model, r.phase, r.seed) == ("RR", phase, 1) else r for r in results.runs
    ]
    return results


def test_remarks_name_the_model_and_the_cause():
    assert remarks(made_up()[0]) == remarks(with_run("A→A", accuracy=[0.1])) == []
    assert remarks(with_run("I", accuracy=[0.16])) == remarks(with_run("I", 2, accuracy=[0.61])) == []
    too_large = "λ (--lam 0.1) or the learning rate (--learning-rate 0.5) is probably too large"
    assert remarks(with_run("I", accuracy=[0.9, 0.14])) == [
        f"RR: accuracy after phase I is .140, next to guessing one of 10 classes (.100); {too_large}, "
        "or training too short"
    ]
    assert remarks(with_run("I", reverse_loss=[0.1, float("inf")])) == [
        f"RR: the loss of phase I is not finite; {too_large}"
    ]
    failed = with_run("A→B", task_loss=[float("nan")])
    assert remarks(failed)[0].startswith("RR: the loss of A→B is not finite; λ")
    assert "<strong>Warning.</strong> RR: the loss" in render(failed, made_up()[1])


def test_results_survive_saving(tmp_path):
    results, pictures = made_up()
    save_results(results, pictures, tmp_path)
    again, images = load_results(tmp_path)
    assert again == results
    assert images.keys() == pictures.keys()
    np.testing.assert_array_equal(images["modes RR"], pictures["modes RR"])
    path = write_report(tmp_path)
    assert path.read_text(encoding="utf-8") == render(results, pictures)
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000


def test_unreadable_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        load_results(tmp_path)
    save_results(*made_up(), tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ResultsError, match="results of format 99; this version reads format 1"):
        load_results(tmp_path)
    path.write_text(json.dumps({**content, "runs": [{"model": "Std"}]}))
    with pytest.raises(ResultsError, match="holds no results"):
        load_results(tmp_path)
    path.write_text("{")
    with pytest.raises(ResultsError, match="damaged results"):
        load_results(tmp_path)


def test_terminal_table():
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(results_table(made_up()[0]))
    text = console.export_text()
    assert "toys: test accuracy after each phase, 2 seeds" in text
    assert ".925 ± .007" in text and "2.00 ×" in text
    words = " ".join(text.split())
    assert "Std: plain. RR: <both ways>." in words and "phase I: task A, RR with the reverse loss." in words


def test_accuracy_text():
    assert accuracy_text(0.9811, 0.00211) == ".981 ± .002"
    assert accuracy_text(1.0, None) == "1.000"
    assert accuracy_text(0.5, 0.0) == ".500 ± .000"


def test_panel_draws_every_seed_and_the_mean():
    svg = panel("x & y", {"b": [[1.0, 2.0], [2.0, 3.0]]}, order=["a", "b"])
    assert svg.count('class="seed c1"') == 2 and svg.count('class="mean c1"') == 1
    assert "x &amp; y" in svg


def test_panel_survives_odd_curves():
    assert "nan" not in panel("t", {"a": [[float("nan"), 1.0, float("inf")]]}, order=["a"])
    assert "nan" not in panel("t", {"a": [[0.0, 0.1]]}, order=["a"], logarithmic=True)
    assert 'class="mean c0"' in panel("t", {"a": [[0.5]]}, order=["a"])
    assert 'path class="mean' not in panel("t", {}, order=[])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.93, 0.985), (2.0, 2.0), (0.0, 0.0), (-3.0, 17.0)])
def test_ticks_enclose_the_range(low, high):
    ticks = round_steps(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 7
    ticks = decades(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 7


def test_levels():
    assert grey_levels(np.array([[[-1.0, 0.5, 2.0]]], np.float32)).tolist() == [[0, 128, 255]]
    colours = signed_levels(np.array([[[-2.0, 0.0, 2.0]]], np.float32))
    assert colours.shape == (1, 3, 3)
    assert colours[0, 0, 2] > colours[0, 0, 0] and colours[0, 2, 0] > colours[0, 2, 2]
    assert signed_levels(np.full((1, 2, 2), np.nan, np.float32)).tolist() == [[[247] * 3] * 2] * 2
    assert signed_levels(np.zeros((3, 2, 2), np.float32)).tolist() == [[[128] * 3] * 2] * 2
