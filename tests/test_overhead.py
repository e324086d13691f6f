"""What a step spends around its kernels, as `python -m bench.overhead` measures it."""

from __future__ import annotations

import json

import pytest
import torch

from bench import overhead
from racecar_kernels import extension, tape


@pytest.mark.skipif(extension.load() is None, reason="tapes are replayed by the compiled extension")
def test_every_contestant_has_its_figures_and_its_own_way(tmp_path, capsys, monkeypatch) -> None:
    ways = []
    original = tape.run

    def run(key, *rest):
        ways.append((key[0], tape.enabled))
        return original(key, *rest)

    monkeypatch.setattr(tape, "run", run)
    out = tmp_path / "overhead.json"
    overhead.main(["--rounds", "2", "--json", str(out)])
    rows = json.loads(out.read_text())["overhead"]
    assert [row["contestant"] for row in rows] == list(overhead.CONTESTANTS)
    assert rows[0]["reverse_us"] is None and all(row["step_us"] > 0 for row in rows)
    assert all(row["reverse_us"] == pytest.approx(row["layer_us"] - rows[0]["layer_us"]) for row in rows[1:])
    assert set(ways) == {(part, how) for part in ("forward", "backward") for how in (True, False)}
    assert tape.enabled and "µs per reverse layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--rounds", "0"], "a whole number from 1 is needed, got '0'"),
     (["--json", "nowhere/a.json"], "its folder does not exist")],
)  # fmt: skip
def test_bad_options_are_named(given, said, capsys) -> None:
    with pytest.raises(SystemExit):
        overhead.main(given)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_no_gpu_is_said(capsys) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--device", "cuda"])
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
