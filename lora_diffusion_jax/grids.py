"""Grids: lists of changes to a config, which the `sweep(add)` of a config file makes and combines.

Of `configs/sweeps/digits_rank.py`: `add(grids.product(grids.over("lora.rank", [1, 4]), seeds))`.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lora_diffusion_jax.errors import UserError

Changes = dict[str, Any]  # the fields in which a run departs from the config: {"lora.rank": 4}
Grid = list[Changes]
Add = Callable[[Changes | Grid], None]  # what `sweep` is called with


def over(field: str, values: Iterable[Any]) -> Grid:
    """One run for each value of a field."""
    plain = (value.item() if isinstance(value, np.generic) else value for value in values)
    return [{field: value} for value in plain]


def product(*grids: Grid) -> Grid:
    """Every combination of a run of each grid; the last grid varies fastest."""
    return [_joined(*parts) for parts in itertools.product(*grids)]


def zip(*grids: Grid) -> Grid:
    """The first runs of all grids joined to one, then the second runs, and so on.

    Raises:
        UserError: the grids have different lengths.
    """
    if len({len(grid) for grid in grids}) > 1:
        lengths = " and ".join(str(len(grid)) for grid in grids)
        raise UserError(f"zip got grids of {lengths} runs; it needs as many runs in each.")
    return [_joined(*parts) for parts in itertools.zip_longest(*grids)]


def chain(*grids: Grid) -> Grid:
    """The runs of all grids, one grid after the other."""
    return [dict(changes) for grid in grids for changes in grid]


def sample(grid: Grid, count: int, seed: int = 0) -> Grid:
    """Draws `count` runs of a grid without replacement, in the grid's order: always the same for a seed.

    Raises:
        UserError: the grid has fewer runs.
    """
    if not 0 <= count <= len(grid):
        raise UserError(
            f"sample was asked for {count} runs of a grid of {len(grid)}; ask for fewer."
        )
    chosen = sorted(random.Random(seed).sample(range(len(grid)), count))
    return [dict(grid[i]) for i in chosen]


def _joined(*parts: Changes) -> Changes:
    changes: Changes = {}
    for part in parts:
        if twice := changes.keys() & part.keys():
            raise UserError(
                f"Two grids that are combined both set {min(twice)}; a run can have one value of a field."
            )
        changes |= part
    return changes
