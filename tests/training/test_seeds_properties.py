"""Properties of seeds: in torch's range, the same everywhere, and different for every position in a run."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from advcl_hub.training.seeds import epoch_order, mix, seed_step
from tests.support import properties  # noqa: F401

seeds, counts = st.integers(0, 2**32 - 1), st.integers(0, 10**6)


@given(st.lists(st.tuples(st.sampled_from([0, 1]), seeds, counts, counts), min_size=2, max_size=20, unique=True))
def test_other_positions_have_other_seeds(positions: list[tuple[int, ...]]) -> None:
    found = [mix(*position) for position in positions]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**63 for seed in found)
    assert found == [mix(*position) for position in positions]
    assert len({mix(*position, 0) for position in positions} | set(found)) >= len(found)


@given(seeds, counts)
def test_neighbours_differ_in_about_half_of_their_bits(seed: int, step: int) -> None:
    differing = [(mix(1, seed, step, 0) ^ mix(1, seed, step + each, 0)).bit_count() for each in range(1, 21)]
    assert 25 < np.mean(differing) < 38  # of 63; the standard deviation of the mean is below 1


@given(st.integers(0, 50), seeds, counts)
def test_the_order_of_an_epoch_is_a_permutation_of_its_own_generator(images: int, seed: int, epoch: int) -> None:
    torch.manual_seed(0)
    order = epoch_order(images, seed, epoch)
    assert order.sort().values.tolist() == list(range(images)) and torch.equal(order, epoch_order(images, seed, epoch))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


@given(seeds, counts, st.integers(0, 63))
def test_a_step_is_seeded_by_its_position_alone(seed: int, step: int, rank: int) -> None:
    with torch.random.fork_rng(devices=[]):
        draws = []
        for position in ((seed, step, rank), (seed, step, rank), (seed, step, rank + 1), (seed, step + 1, rank)):
            seed_step(*position)
            draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1] and draws[2] not in draws[:2] and draws[3] not in draws[:3]
