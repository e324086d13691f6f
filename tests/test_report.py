"""The report and the saved results, from made-up figures: no training here."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from racecar.analysis.pictures import grey_levels, signed_levels
from racecar.demo.curves import decade_steps, panel, power_text, round_steps
from racecar.demo.inside import heat, information_section
from racecar.demo.remarks import remarks
from racecar.demo.report import render, write_report
from racecar.demo.results import (
    PHASES,
    Cost,
    LayerError,
    Reconstruction,
    Results,
    ResultsError,
    Run,
    load_results,
    save_results,
)
from racecar.demo.terminal import accuracy_table, cost_table
from racecar.demo.text import (
    accuracy_text,
    figure_text,
    joined,
    p_text,
    phases_text,
    reverse_names,
    signed_text,
    time_text,
)

TITLES = {
    "Std": "plain",
    "RR": "<both ways>",
    "Pre": "layer-wise pretraining, no labels in phase I",
    "Ort": "with kernels kept nearly orthogonal (SRIP)",
    "RR¹": "full reverse pass, first layer compared",
    "RR local": "reverse pass layer by layer",
}


def made_up(seeds: int = 2, channels: int = 1, models: tuple[str, ...] = ("Std", "RR"), classes: int = 4):
    """Results and pictures of a demo that never ran; "Pre" has no labels in phase I, the first seeds differ clearly."""
    results = Results(
        models={name: TITLES[name] for name in models},
        data={
            "name": "toys",
            "description": "toys: found 9 images & more",
            "notes": ["Limited to 9."],
            "classes": [str(i) for i in range(classes)],
            "used": [720, 179],
            "labelled": 100,
        },
        settings={"lam": 0.1, "labels": 0, "blur": 3.0, "angle": 15.0, "limit": None, "quick": False, "models": ""},
        versions={"torch": "2.13.0"},
        command="racecar demo --data '<toys>'",
        started="2026-01-01T00:00:00+00:00",
        seconds=12.0,
    )
    rng = np.random.default_rng(0)
    for m, model in enumerate(models):
        for seed in range(seeds):
            results.runs += [made_up_run(model, m, seed, phase) for phase in PHASES]
        results.costs[model] = Cost(2.0 + m, 1.9, 2.1, 1.0 + m, 1_000_000, 1.0 + 0.1 * m, 2_500_000, 1.0 + 0.2 * m)
        results.reconstructions[model] = Reconstruction(0.9 / 10 ** (2 * m), 504.0, 0.4)
        results.depths[model] = {"0": 0.125, "3": 0.4}
        results.information[model] = {"D1": [5.0, 3.25], "D2": [4.5 - 0.1 * m, 3.125]}
        results.reversibility[model] = {"0": LayerError(0.25, 0.7), "3": LayerError(0.1 * m, 1.0)}
    results.energy = {name: 0.2 + 0.1 * m for m, name in enumerate(models)} | {"data": 0.9}
    names = ["modes data", *(f"modes {name}" for name in models)]
    pictures = {name: rng.normal(size=(10, channels, 5, 6)).astype(np.float32) for name in names}
    for name in ["input", "blurred", *(f"reconstruction {name}" for name in models)]:
        pictures[name] = rng.uniform(size=(classes, channels, 5, 6)).astype(np.float32)
    return results, pictures


def made_up_run(model: str, place: int, seed: int, phase: str) -> Run:
    """Two epochs that any model could have gone through."""
    first, reverse = phase == "I", model.startswith("RR")
    losses = {"0": [0.5, 0.02], "3": [0.3, 1e-5]} if first and (reverse or model == "Pre") else {}
    accuracy = [0.5, 0.9 + 0.02 * place + 0.01 * seed + 0.001 * (seed * place % 2)]
    labelled = not (first and model == "Pre")
    return Run(
        model=model,
        seed=seed,
        phase=phase,
        task_loss=[1.0, 0.1] if labelled else [],
        reverse_loss=[0.5, 0.1] if first and reverse else [],
        layer_losses=losses,
        accuracy=accuracy if labelled else [],
        seconds=1.0,
    )


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


@pytest.mark.parametrize(
    ("seeds", "channels", "models", "classes"),
    [(2, 1, ("Std", "RR"), 4), (1, 3, ("Std", "RR"), 3), (5, 1, tuple(TITLES), 10), (1, 1, ("Std",), 2)],
)
def test_page_is_whole_and_refers_to_nothing_outside(seeds, channels, models, classes):
    text = render(*made_up(seeds, channels, models, classes))
    page = Page(text)
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"https?:|@import|url\(|<script|\$\w", text)
    # two tasks, the input and its reconstructions; patterns of the data and of every model
    assert page.count["img"] == (3 + len(models)) * classes + (1 + len(models)) * 10
    assert page.count["svg"] == (8 if len(models) > 1 else 6)
    assert page.count["table"] == 6
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and '<html lang="en">' in text
    assert "nan" not in text


def test_page_shows_figures_command_and_versions():
    text = render(*made_up())
    for part in (">.905 ± .007<", "<b>.925 ± .008</b>", "2.00 ×", "1.10 ×", "1.20 ×", "2.50 MB", "torch 2.13.0"):
        assert part in text, part
    for part in ("× 0.90", "× 0.009", "error 0.40", "Std 504, RR 504", "holds 30%", "lam = 0.1", "labels = 0"):
        assert part in text, part
    assert "racecar demo --data &#x27;&lt;toys&gt;&#x27;" in text
    assert "&lt;both ways&gt;" in text and "found 9 images &amp; more" in text
    assert "Limited to 9." in text
    assert "limit =" not in text and "quick" not in text and "models =" not in text
    assert "2026-01-01 00:00 +00:00; took 12 s" in text
    assert "blurred over 3 pixels at 15°, and 100 labelled images" in text
    assert "<dt>command</dt>" in text and "<dt>command</dt>" not in render(*without_command())


def without_command():
    results, pictures = made_up()
    results.command = ""
    return results, pictures


def test_layers_are_counted_from_the_input():
    text = render(*made_up())
    assert "Loss of layer 1, phase I" in text and "Loss of layer 2, phase I" in text and "layer 3" not in text
    assert '>layer 1</th><th scope="col">layer 2<' in text and "(in the network: 0 and 3)" in text
    assert '<span class="heat" style="--h:0.750">0.25</span>' in text
    assert '>from layer 1</th><th scope="col">from layer 2<' in text
    assert '<span class="heat" style="--h:0.875">0.12</span>' in text  # 0.125, the image's error from layer 1
    assert '"--h:0.000"' in heat(1.0) == heat(1.0) and '"--h:0.000"' in heat(float("nan"))


def test_results_of_older_versions_have_no_errors_by_depth():
    results, pictures = made_up()
    results.depths, results.information = {}, {}
    text = render(results, pictures)
    assert Page(text).count["table"] == 4 and "by depth" not in text and "from layer" not in text


def test_differences_beyond_chance_are_marked_and_told():
    text = render(*made_up())
    assert text.count('<small class="clear">▲ +.0') == 3
    assert re.search(r"A→B:</strong> RR is 2\.\d points ahead of Std\.", text)
    assert "In small print: the difference to Std" in text
    worse = made_up()
    worse[0].models = dict(reversed(worse[0].models.items()))
    assert "▼ −.0" in render(*worse) and "points behind RR" in render(*worse)


def test_nothing_is_said_of_chance_where_nothing_is_known():
    alike, pictures = made_up()
    alike.runs = [replace(r, accuracy=[0.5, 0.9 if r.model == "Std" else 0.95]) for r in alike.runs]
    text = render(alike, pictures)
    assert ">+.050, <br>p .500<" in text and "A→B:</strong> no clear difference to Std." in text
    text = render(*made_up(seeds=1))
    assert "of one seed. A seed" in text and "cannot tell a difference from chance" in text
    assert "In small print" not in text and "A→B:</strong>" not in text and "p ." not in text
    assert "thin: one seed" not in text


def test_bold_is_the_highest_mean():
    assert render(*made_up()).count("<b>") == render(*made_up(seeds=1)).count("<b>") == 3  # one in each phase
    results, pictures = made_up()
    results.runs = [replace(run, accuracy=[0.5]) for run in results.runs]
    assert "<b>" not in render(results, pictures)
    assert "<b>" not in render(*made_up(models=("Std",)))


def test_page_speaks_of_the_models_and_images_it_has():
    text = render(*made_up())
    assert "autoencoder;" not in text and "sees no labels" not in text
    assert "on the test images after the last epoch" in text and "set aside" not in text
    assert "Red positive" in text and "first ten classes" not in text
    results, pictures = made_up(3, 3, ("Std", "Pre"), 12)
    results.data["validated"] = True
    text = render(results, pictures)
    assert "Pre: phase I sees no labels" in text and "Pre: one step of every layer&" not in text
    assert "Pre: one step of every layer's autoencoder" in text and "reverse pass, in which" not in text
    assert "on the validation images" in text and "test images" not in text and "179 of the training images" in text
    assert "Red positive" not in text and "first ten classes" in text


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
    with pytest.raises(ResultsError, match="results of format 99; this version reads format 2"):
        load_results(tmp_path)
    path.write_text(json.dumps({**content, "runs": [{"model": "Std"}]}))
    with pytest.raises(ResultsError, match="holds no results"):
        load_results(tmp_path)
    path.write_text("{")
    with pytest.raises(ResultsError, match="damaged results"):
        load_results(tmp_path)


def printed(table) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_terminal_tables():
    text = printed(accuracy_table(made_up()[0]))
    assert "toys: test accuracy after each phase, 2 seeds" in text
    assert ".925 ± .008" in text and "A→B − Std" in text and "(p .016)" in text
    words = " ".join(text.split())
    assert "Std: plain. RR: <both ways>." in words and "phase I: task A, RR with the reverse loss." in words
    text = printed(cost_table(made_up()[0]))
    assert "ratios to Std" in text and "2.00 ×" in text and "1.10 ×" in text and "1.20 ×" in text
    assert "(p" not in printed(accuracy_table(made_up(seeds=1)[0]))


def test_texts():
    assert accuracy_text(0.9811, 0.00211) == ".981 ± .002"
    assert accuracy_text(1.0, None) == "1.000"
    assert accuracy_text(0.5, 0.0) == ".500 ± .000"
    assert [signed_text(v) for v in (0.0091, -0.0122, 0.0)] == ["+.009", "−.012", "+.000"]
    assert [p_text(p) for p in (0.0129, 0.0009, 1.0)] == [".013", "< .001", "1.000"]
    assert [joined(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    figures = (0.00145, 0.38, 1.031, 9.99, 503.6, 12_345.0, 1.23e7, -0.5, float("nan"))
    assert [figure_text(v) for v in figures] == [
        *("0.0014", "0.38", "1.03", "9.99", "504", "12,345", "1.2e+07", "-0.50", "nan")
    ]
    assert time_text("yesterday") == "yesterday"


def test_texts_without_a_reverse_loss():
    results, _ = made_up(models=("Std", "Ort"))
    assert reverse_names(results) == ""
    assert phases_text(results).startswith("phase I: task A. phase II")


def test_panel_draws_every_seed_and_the_mean():
    svg = panel("x & y", {"b": [[1.0, 2.0], [2.0, 3.0]]}, order=["a", "b"])
    assert svg.count('class="seed c1"') == 2 and svg.count('class="mean c1"') == 1
    assert 'aria-label="x &amp; y. After the last epoch: b 2.5"' in svg
    both = panel("t", {"a": [[1.0, 2.0]], "b": [[2.0, 3.0]]}, order=["a", "b"])
    assert both.index('class="seed c1"') < both.index('class="mean c0"')  # no seed is drawn over a mean


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
    ticks = decade_steps(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8


def test_decades_are_divided_over_a_short_range():
    assert [power_text(t) for t in decade_steps(-2.1, -1.4)] == ["0.005", "0.01", "0.02", "0.05"]
    assert [power_text(t) for t in decade_steps(-3.9, 0.3)] == ["10⁻⁴", "0.001", "0.01", "0.1", "1", "10"]
    assert [power_text(t) for t in decade_steps(-4.2, -3.6)] == ["5·10⁻⁵", "10⁻⁴", "2·10⁻⁴", "5·10⁻⁴"]
    assert [power_text(t) for t in (3.0, 6.0)] == ["1000", "10⁶"]


def test_levels():
    assert grey_levels(np.array([[[-1.0, 0.5, 2.0]]], np.float32)).tolist() == [[0, 128, 255]]
    colours = signed_levels(np.array([[[-2.0, 0.0, 2.0]]], np.float32))
    assert colours.shape == (1, 3, 3)
    assert colours[0, 0, 2] > colours[0, 0, 0] and colours[0, 2, 0] > colours[0, 2, 2]
    assert signed_levels(np.full((1, 2, 2), np.nan, np.float32)).tolist() == [[[247] * 3] * 2] * 2
    assert signed_levels(np.zeros((3, 2, 2), np.float32)).tolist() == [[[128] * 3] * 2] * 2


def test_information_of_the_layers():
    results, _ = made_up()
    text = " ".join(information_section(results))
    assert "5.00, 3.25" in text and "4.50, 3.12" in text and "racecar run mi" not in text
    bound = math.log2(results.data["used"][1])
    for own in results.information.values():
        own.update({"D1": [bound, 3.0], "D2": [bound - 0.001, 3.0]})
    assert "says nothing of them" in " ".join(information_section(results))
    results.information = {}
    assert "".join(information_section(results)) == ""
