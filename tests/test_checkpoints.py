"""Checkpoints: safetensors with plain keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import racecar
from racecar.demo.network import fresh_network
from racecar.training import CheckpointError, load_checkpoint, save_checkpoint


def test_checkpoint_round_trip_wrapped_or_not(tmp_path):
    path = tmp_path / "a.safetensors"
    source = fresh_network((1, 8, 8), 10, 0)
    save_checkpoint(racecar.wrap(source, lam=0.1), path, {"seed": "0"})
    target = fresh_network((1, 8, 8), 10, 1)
    load_checkpoint(target, path)
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
    load_checkpoint(racecar.wrap(target, lam=0.1), path)


def test_checkpoint_of_another_architecture_names_the_keys_and_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)), path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(3, 6, bias=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    text = str(caught.value)
    assert "another architecture than this Sequential" in text
    assert "missing: 1.weight, 1.bias" in text
    assert "2.weight is (2, 3), the model has (6, 3)" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="unexpected: 2.weight"):
        load_checkpoint(nn.Sequential(nn.Linear(4, 3)), path)


def test_checkpoint_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"PK something else")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "bad.safetensors")
