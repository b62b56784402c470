"""What the seed of a random choice of images decides."""

from collections.abc import Callable

import pytest

from advcl_hub.data import ImageData, few_shot, load_data, train_val_split

CHOICES: dict[str, Callable[[ImageData, int], ImageData]] = {
    "few_shot": lambda data, seed: few_shot(data, 3, seed),
    "train_val_split": lambda data, seed: train_val_split(data, 0.2, seed)[1],
    "sample": lambda data, seed: data.sample(20, seed),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_seed_has_a_choice_of_its_own(choice: str) -> None:
    data = load_data("fake:200")
    chosen = [CHOICES[choice](data, seed).indices.tolist() for seed in (0, 1, 0)]
    assert chosen[0] == chosen[2] != chosen[1]
