"""The 4096 patterns: generated ones, the study's file, and files that are not it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.io import savemat

from racecar.data import DataError
from racecar.recipes.patterns import amplitude, generated_patterns, icosahedron, load_patterns, read_patterns

FINGERPRINT = 2759139839  # of the study's var_u.mat


@pytest.fixture(scope="module")
def content():
    """What the file holds."""
    made = generated_patterns()
    return {"F": made.x, "y": made.y[None].astype(np.uint8)}


def test_generated_patterns_are_those_of_the_study():
    made = generated_patterns()
    assert made.fingerprint == FINGERPRINT
    assert made.x.shape == (4096, 12) and made.y.mean() == pytest.approx(0.517, abs=1e-3)
    assert len(np.unique(made.x, axis=0)) == 4096


def test_the_rule_is_the_same_for_turned_and_mirrored_points():
    points = icosahedron()
    assert np.linalg.norm(points, axis=1) == pytest.approx(np.ones(12))
    near = np.sort(points @ points.T, axis=1)
    assert near[:, 0] == pytest.approx(-np.ones(12)) and near[:, 6:11] == pytest.approx(np.full((12, 5), 5**-0.5))
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    x = np.random.default_rng(1).integers(0, 2, (50, 12))
    for degree in range(4):
        assert amplitude(x, points @ turn, degree) == pytest.approx(amplitude(x, points, degree), abs=1e-6)
    assert amplitude(x, points, 0) == pytest.approx(x.sum(1))
    assert amplitude(x, points, 1) == pytest.approx(np.linalg.norm(x @ points, axis=1), abs=1e-6)


def test_the_file_is_read_back(tmp_path, content):
    savemat(tmp_path / "var_u.mat", content)
    found = read_patterns(tmp_path / "var_u.mat")
    assert found.fingerprint == FINGERPRINT and found.source == "var_u.mat"
    assert load_patterns(None).source == "generated patterns"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"F": None}, "holds y; expected F, y"),
        ({"F": np.zeros((7, 12))}, r"F has shape \(7, 12\) and y \(1, 4096\); expected \(4096, 12\)"),
        ({"y": np.zeros((1, 5))}, r"y \(1, 5\); expected"),
        ({"y": np.zeros((1, 4096))}, "y holds one class only, 0"),
        ({"y": np.arange(4096)[None] % 3}, "y holds 0, 1, 2, ...; expected 0 and 1 only"),
        ({"F": np.zeros((4096, 12))}, "F holds 1 different patterns; expected all 4096"),
    ],
)
def test_other_content_is_refused(tmp_path, content, change, message):
    own = {name: value for name, value in {**content, **change}.items() if value is not None}
    savemat(tmp_path / "other.mat", own)
    with pytest.raises(DataError, match=message):
        read_patterns(tmp_path / "other.mat")


def test_missing_and_damaged_files_are_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"no such file: .*var_u.mat \(give the study's"):
        read_patterns(tmp_path)
    with pytest.raises(DataError, match=r"no such file: .*var_u.mat \(give the study's"):
        read_patterns(tmp_path / "var_u.mat")
    path = tmp_path / "var_u.mat"
    savemat(path, content, do_compression=True)
    whole = path.read_bytes()
    for length in (0, 60, 200, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a readable MATLAB file, or cut short|expected F, y"):
            read_patterns(path)
    path.write_text("no MATLAB at all")
    with pytest.raises(DataError, match="not a readable MATLAB file"):
        read_patterns(path)
