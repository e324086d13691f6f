"""`python -m bench.forms`: every form of a product gives the same numbers, and the backend's choice is marked."""

from __future__ import annotations

import json

import pytest
import torch

from bench.forms import __main__ as command
from bench.forms import image
from bench.forms.timing import DifferentError, Row, Timed, check
from racecar_kernels import extension, few_channels, pointwise

SMALL = {
    "forms": [(2, 16, 3, 6), (2, 3, 16, 6)],
    "few": [(3, 16, 2, 6), (8, 256, 1, 6)],
    "first": [(3, 16, 9, 6), (8, 256, 1, 6)],
    "joined": [(2, 16, 6), (2, 64, 2)],
}
needs_extension = pytest.mark.skipif(extension.why_not() is not None, reason="needs the C++ extension")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    tables = {name: table._replace(shapes=SMALL[name]) for name, table in command.TABLES.items()}
    monkeypatch.setattr(command, "TABLES", tables)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize("dtype", command.DTYPES)
def test_every_table(dtype: str, tmp_path, capsys) -> None:
    target = tmp_path / "forms.json"
    command.main(["--rounds", "1", "--dtype", dtype, "--json", str(target)])
    written = json.loads(target.read_text())
    assert written["dtype"] == dtype and written["threads"] == 1
    assert {row["table"] for row in written["rows"]} == set(SMALL)
    assert all(row["chosen"] in row["ms"] and min(row["ms"].values()) > 0 for row in written["rows"])
    printed = capsys.readouterr().out
    assert printed.count("*") == len(written["rows"]) and "3 and 16 channels, batch 2, 6x6:" in printed


@needs_extension
def test_what_lies_beyond_a_bound_is_timed_but_not_chosen() -> None:
    within, beyond = (image.few_rows(torch.float32, *shape) for shape in SMALL["few"])
    folded = 1  # 4x4 taps of 3 channels: more than 36 weights
    assert [row.chosen for row in within] == ["library" if i == folded else "image" for i in range(5)]
    assert {row.chosen for row in beyond} == {"library"}
    with image.lifted():
        assert few_channels.FEW == image.MOST_FEW and pointwise.MOST_WEIGHTS > 72
        assert all(form().isfinite().all() for row in beyond for form in row.forms.values())
    assert (few_channels.FEW, pointwise.MOST_WEIGHTS) == (4, 36)
    with pytest.raises(ValueError, match="an image kernel does not serve"):
        image.few_rows(torch.float32, 3, 256, 1, 6)[0].forms["image"]()


def test_different_forms_are_not_timed() -> None:
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    with pytest.raises(DifferentError, match="weight: 'b' differs from 'a' by 5.8e-02 of its norm"):
        check(Row("weight", {"a": lambda: one, "b": lambda: other}, "a"))
    with pytest.raises(DifferentError, match="nan"):
        check(Row("weight", {"a": lambda: one, "b": lambda: one * torch.nan}, "a"))


def test_a_slow_choice_is_remarked_on() -> None:
    row = Timed("few", "", "forward", {"image": 3.0, "library": 1.5}, "image")
    assert " ".join(command.line(row).split()) == "forward image 3.00*, library 1.50 (2.0 times the fastest)"
    assert "times" not in command.line(Timed("few", "", "forward", row.ms, "library"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "a whole number from 1 is needed, got '0'"),
        (["--only", "many"], "invalid choice: 'many'"),
        (["--json", "no/such/folder.json"], "no/such/folder.json cannot be written, its folder does not exist"),
    ],
)
def test_bad_options(arguments, says, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert says in capsys.readouterr().err


def test_without_the_extension_its_tables_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(extension, "why_not", lambda: "it was not built")
    with pytest.raises(SystemExit):
        command.main(["--only", "few"])
    assert "need the C++ extension: it was not built; take --only forms" in capsys.readouterr().err
    command.main(["--only", "joined", "--rounds", "1"])
