"""Random numbers that follow from the place in a run."""

import itertools

import torch

from advcl_hub.training.seeds import epoch_order, seed_step


def test_every_epoch_of_every_seed_has_an_order_of_its_own() -> None:
    orders = {(seed, epoch): epoch_order(50, seed, epoch).tolist() for seed in range(2) for epoch in range(3)}
    assert all(one != other for one, other in itertools.combinations(orders.values(), 2))
    assert orders[1, 2] == epoch_order(50, 1, 2).tolist()


def test_every_step_of_every_process_draws_numbers_of_its_own() -> None:
    drawn: dict[tuple[int, int, int], list[float]] = {}
    with torch.random.fork_rng():
        for place in [*itertools.product(range(2), repeat=3), (1, 1, 0)]:
            seed_step(*place)
            numbers = torch.rand(4).tolist()
            assert drawn.setdefault(place, numbers) == numbers
    assert all(one != other for one, other in itertools.combinations(drawn.values(), 2))
