"""Random crops and flips of whole batches."""

from __future__ import annotations

import pytest
import torch

from racecar.data import crop_and_flip
from racecar.training import Batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_result_is_a_crop_of_the_padded_image_or_of_its_mirror_image() -> None:
    x = torch.rand(40, 2, 5, 6)
    found = crop_and_flip(x, generator(), padding=2)
    kinds = set()
    for image, result in zip(x, found, strict=True):
        crops = {}
        for flipped in (False, True):
            whole = torch.zeros(2, 9, 10)
            whole[:, 2:7, 2:8] = image
            for row in range(5):
                for column in range(5):
                    crop = whole[:, row : row + 5, column : column + 6]
                    crops[flipped, row, column] = crop.flip(-1) if flipped else crop
        matching = [key for key, crop in crops.items() if torch.equal(crop, result)]
        assert matching
        kinds.add(matching[0])
    assert len(kinds) > 15, "the images are moved one by one"
    assert {flipped for flipped, *_ in kinds} == {False, True}


def test_what_stays() -> None:
    x = torch.rand(3, 4, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = crop_and_flip(x, generator(), padding=3)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_and_flip(x, padding=0, flip=False), x)
    assert torch.equal(crop_and_flip(x, generator(5)), crop_and_flip(x, generator(5)))


@pytest.mark.parametrize(
    ("x", "given", "said"),
    [(torch.rand(3, 4, 4), {}, "must have the shape"), (torch.rand(1, 3, 4, 4), {"padding": -1}, "padding must be 0")],
)
def test_bad_input(x: torch.Tensor, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        crop_and_flip(x, **given)


def test_batches_are_augmented_anew_in_every_epoch_and_alike_in_a_resumed_one() -> None:
    x, y = torch.rand(10, 1, 6, 6), torch.arange(10)

    def epoch(number: int) -> list[torch.Tensor]:
        batches = Batches(x, y, 4, seed=3, augment=crop_and_flip)
        batches.set_epoch(number)
        return [images for images, _ in batches]

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = Batches(x, y, 4, seed=3)
    augmented = Batches(x, y, 4, seed=3, augment=crop_and_flip)
    assert [b.tolist() for _, b in plain] == [b.tolist() for _, b in augmented], "the order is the same"
    with pytest.raises(ValueError, match="need a seed"):
        Batches(x, y, 4, augment=crop_and_flip)
