"""Grids of changes and how they combine."""

import numpy as np
import pytest

from lora_diffusion_jax import grids
from lora_diffusion_jax.errors import UserError

RANKS = [{"lora.rank": 1}, {"lora.rank": 4}]
SEEDS = [{"train.seed": 0}, {"train.seed": 1}]


def test_a_product_varies_the_last_grid_fastest():
    assert grids.over("lora.rank", [1, 4]) == RANKS
    assert grids.product(RANKS, grids.over("train.seed", range(2))) == [
        {"lora.rank": 1, "train.seed": 0},
        {"lora.rank": 1, "train.seed": 1},
        {"lora.rank": 4, "train.seed": 0},
        {"lora.rank": 4, "train.seed": 1},
    ]


def test_zip_joins_the_runs_in_turn_and_chain_lists_them():
    assert grids.zip(RANKS, SEEDS) == [
        {"lora.rank": 1, "train.seed": 0},
        {"lora.rank": 4, "train.seed": 1},
    ]
    assert grids.chain(RANKS, SEEDS) == RANKS + SEEDS


def test_a_sample_is_a_part_of_the_grid_and_the_same_for_a_seed():
    grid = grids.over("train.seed", range(100))
    drawn = grids.sample(grid, 10, seed=1)
    assert drawn == grids.sample(grid, 10, seed=1) != grids.sample(grid, 10, seed=2)
    numbers = [changes["train.seed"] for changes in drawn]
    assert numbers == sorted(set(numbers))
    assert grids.sample(grid, 100) == grid


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: grids.zip(RANKS, SEEDS[:1]), "grids of 2 and 1 runs"),
        (lambda: grids.product(RANKS, RANKS), "both set lora.rank"),
        (lambda: grids.sample(RANKS, 3), "3 runs of a grid of 2"),
    ],
)
def test_mistakes_are_plain_errors(mistake, words):
    with pytest.raises(UserError, match=words):
        mistake()


def test_values_of_numpy_are_plain_ones():
    (first, second) = grids.over("train.learning_rate", np.array([1e-3, 1e-4]))
    assert [type(run["train.learning_rate"]) for run in (first, second)] == [float, float]
    assert first == {"train.learning_rate": 1e-3}
