"""Opt-in tuning with a timer that is made up: what is tried, what is kept, what is written, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import racecar_kernels as rk
from racecar_kernels.lazy import Lazy

pytest.importorskip("triton", reason="Triton is not installed")
from racecar_kernels.gpu import configs, device, linear, pointwise, tuning

pytestmark = pytest.mark.usefixtures("interpreted", "clean")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = device.current().architecture


@pytest.fixture
def clean(monkeypatch):
    """No entry is in effect before or behind a test, and the environment is read anew."""
    for name in ("RACECAR_TUNE", "RACECAR_TUNED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning, "_tuner", None)
    tuning._read_environment.cache_clear()
    configs.overlay(HERE, {})
    yield
    tuning._read_environment.cache_clear()
    configs.overlay(HERE, {})


@pytest.fixture
def timed(monkeypatch) -> list[float]:
    """Times that were given out: every candidate is quicker than the one before."""
    given: list[float] = []

    def milliseconds(run) -> float:
        run()
        given.append(-float(len(given)))
        return given[-1]

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return given


def product() -> torch.Tensor:
    torch.manual_seed(0)
    p, weight = torch.randn(33, 32), torch.randn(16, 32)
    return linear.linear(p.to(DEVICE), weight.to(DEVICE))


def test_the_quickest_is_kept_written_and_loaded(tmp_path, monkeypatch, timed) -> None:
    path, want = tmp_path / "tuned.json", product()
    with rk.autotune(path):
        assert torch.equal(product(), want)  # whatever is measured, the result is that of the known config
        table = json.loads(path.read_text())
        name = "linear product/ieee/aligned small"
        shipped = configs.candidates(name, HERE)
        assert len(timed) == len(shipped) == 2
        assert table["configs"] == {name: list(shipped[0])}  # the table's own is the last, and is tried first
        torch.testing.assert_close(product(), want)
        assert len(timed) == 2
    assert table.keys() == {"architecture", "triton", "torch", "configs"} and table["architecture"] == HERE
    asked = ("product", "ieee", 33, 16, 32, device.current(), True)
    configs.overlay(HERE, {})
    untuned = configs.linear(*asked)
    monkeypatch.setenv("RACECAR_TUNED", str(path))
    tuning._read_environment.cache_clear()
    torch.testing.assert_close(product(), want)
    assert configs.linear(*asked) != untuned


def test_the_environment_starts_it(tmp_path, monkeypatch, timed) -> None:
    monkeypatch.setenv("RACECAR_TUNE", str(tmp_path / "tuned.json"))
    product()
    assert timed and (tmp_path / "tuned.json").is_file()


def test_a_file_is_added_to_and_what_it_holds_is_not_measured_again(tmp_path, timed) -> None:
    path = tmp_path / "tuned.json"
    with rk.autotune(path):
        product()
    number = len(timed)
    with rk.autotune(path):
        product()
        assert len(timed) == number
        pointwise.sum_of_squares(*(Lazy(torch.randn(9, 5, device=DEVICE)) for _ in range(2)))
    assert len(timed) > number
    assert len(json.loads(path.read_text())["configs"]) == 2


def test_measuring_leaves_alone_what_a_launch_writes_in_place(tmp_path, timed) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 7, device=DEVICE)
    want = pointwise.materialise(Lazy(x.clone(), act="elu", args=(0.8,)), in_place=True)[0]
    with rk.autotune(tmp_path / "tuned.json"):
        got = pointwise.materialise(Lazy(x, act="elu", args=(0.8,)), in_place=True)[0]
    assert timed and got is x and torch.equal(got, want)


@pytest.mark.parametrize("recorded", ["is_compiling", "is_current_stream_capturing"])
def test_nothing_is_measured_while_something_is_recorded(tmp_path, monkeypatch, timed, recorded: str) -> None:
    owner = torch.compiler if recorded == "is_compiling" else torch.cuda
    with rk.autotune(tmp_path / "tuned.json"), monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(owner, recorded, lambda: True)
        patched.setattr(device, "of", lambda t: device.INTERPRETER)
        pointwise.sum_of_squares(*(Lazy(torch.randn(9, 5, device=DEVICE)) for _ in range(2)))
    assert not timed and not (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize("kind", ["half", "single"])
@pytest.mark.parametrize("shape", ["channels_last 1", "contiguous 1", "channels_last 2", "contiguous 2"])
def test_results_do_not_depend_on_the_config(kind: str, shape: str) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if "last" in shape else torch.contiguous_format
    window = (2, 2) if shape.endswith("2") else None
    x = torch.randn(2, 5, 9, 8).to(DEVICE, torch.bfloat16 if kind == "half" else torch.float32, memory_format=layout)
    d = Lazy(x, act="tanh")
    a = Lazy(torch.nn.functional.max_pool2d(x, 2).contiguous(memory_format=layout) if window else x.clone())
    found = []
    for config in configs.candidates(f"pointwise/{kind}/{shape}", HERE):
        configs.overlay(HERE, {f"pointwise/{kind}/{shape}": tuple(config)})
        found.append(pointwise.compare(d, a, window))
        assert f"pointwise/{kind}/{shape}" in configs.asked(HERE)
    assert len(found) >= 3
    for loss, source in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        assert torch.equal(source, found[0][1])


TABLE = {"architecture": HERE, "triton": "3.7.1", "torch": "2.13.0", "configs": {}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no table of tuned configs"),
        ("[]", "is no table of tuned configs"),
        (json.dumps({**TABLE, "architecture": "sm_70"}), "was tuned on sm_70, this device is sm_"),
        (json.dumps({**TABLE, "configs": {"pointwise/half/contiguous 1": [1 << 20, 1, 1]}}), "which is not shipped"),
        (json.dumps({**TABLE, "configs": {"nothing/half/few": [1, 2, 3]}}), "which is not shipped"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, text: str, sentence: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence), rk.autotune(path):
        pass
    monkeypatch.setenv("RACECAR_TUNED", str(path))
    for _ in range(2):  # every launch says so, not the first one alone
        with pytest.raises(ValueError, match=sentence):
            product()
    assert path.read_text() == text


@pytest.mark.gpu
def test_times_are_taken_on_the_device(tmp_path) -> None:
    with rk.autotune(tmp_path / "tuned.json"):
        product()
    assert json.loads((tmp_path / "tuned.json").read_text())["configs"]
    x = torch.randn(1 << 22, device="cuda")
    assert 0 < tuning.milliseconds(lambda: x.mul(2)) < tuning.milliseconds(lambda: [x.mul(2) for _ in range(20)])


def test_what_was_looked_up_while_recorded_is_measured_by_its_own_launch(tmp_path, monkeypatch, timed) -> None:
    path = tmp_path / "tuned.json"
    with rk.autotune(path):
        monkeypatch.setattr(tuning, "_is_recorded", lambda: True)
        product()
        monkeypatch.setattr(tuning, "_is_recorded", lambda: False)
        pointwise.sum_of_squares(*(Lazy(torch.randn(2, 3, 4, 5, device=DEVICE)) for _ in range(2)))
        assert all(name.startswith("pointwise") for name in json.loads(path.read_text())["configs"])
        product()
        assert "linear product/ieee/aligned small" in json.loads(path.read_text())["configs"]


def test_a_config_that_does_not_run_is_not_kept(tmp_path, monkeypatch) -> None:
    def milliseconds(run) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    with rk.autotune(tmp_path / "tuned.json"):
        assert product().isfinite().all()
    assert not (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize("name", ["nowhere/tuned.json", "."])
def test_where_nothing_can_be_written(tmp_path, name) -> None:
    with pytest.raises(ValueError, match="a file in a folder that exists, got"), rk.autotune(tmp_path / name):
        pass
