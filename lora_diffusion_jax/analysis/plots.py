"""Pictures of what `analysis` measures, as PNG files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure

from lora_diffusion_jax import files

NOISE = "noise level $\\sigma$ (spaced by the network's time)"
_MOST_TICKS = 6


def short(site: str) -> str:
    """A site without the part that all of ours begin with."""
    return site.removeprefix("model/")


def write(figure: Figure, path: Path) -> None:
    """Writes a figure whole or not at all."""
    with files.atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _ticks(names: Sequence[str], most: int = _MOST_TICKS) -> tuple[np.ndarray, list[str]]:
    """Evenly spaced positions, both ends among them, and their names."""
    at = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    return at, [names[k] for k in at]


def sigma_names(sigmas: np.ndarray) -> list[str]:
    """Noise levels as short text."""
    return [f"{sigma:.2g}" if sigma < 1000 else f"{sigma:.0e}" for sigma in sigmas]


def panels(
    draw: Callable[[Axes, int], Any],
    sites: Sequence[str],
    title: str,
    colours: str = "",
    labels: tuple[str, str] = ("", ""),
) -> Figure:
    """A figure with one panel per site.

    Args:
        draw: (axes, number of the site) -> what the colour bar belongs to.
        sites: the panels' titles.
        title: of the figure.
        colours: title of the one colour bar; '' for none.
        labels: of the x and y axis of all panels.
    """
    columns = min(4, len(sites))
    rows = -(-len(sites) // columns)
    figure = _figure(title, 0.8 + 2.9 * max(columns, 2), 1.3 + 2.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    drawn: Any = None
    for k, place in enumerate(axes.flat):
        if k < len(sites):
            drawn = draw(place, k)
            place.set_title(short(sites[k]), fontsize=9)
            place.tick_params(labelsize=7)
        else:
            place.set_axis_off()
    if colours:
        figure.colorbar(drawn, ax=axes, label=colours, aspect=40, pad=0.01)
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    return figure


def heat_map(
    axes: Axes,
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    scale: Normalize,
    colours: str,
    most_rows: int = _MOST_TICKS,
) -> Any:
    """Values [rows, columns] as colours, with some of the names at the axes."""
    drawn = axes.imshow(values, aspect="auto", norm=scale, cmap=colours, interpolation="nearest")
    axes.set_xticks(*_ticks(columns, 10 if len(columns) <= 10 else _MOST_TICKS))
    axes.set_yticks(*_ticks(rows, most_rows))
    return drawn


def omega(table: np.ndarray, sites: Sequence[str], columns: Sequence[str], label: str) -> Figure:
    """Composition weights [S, N, m] of every site: bases over conditions."""
    limit = np.abs(table).max() or 1.0
    bases = [str(i) for i in range(table.shape[-1])]

    def draw(axes: Axes, k: int) -> Any:
        return heat_map(axes, table[k].T, columns, bases, Normalize(-limit, limit), "RdBu_r", 12)

    title = "Composition weights $\\omega_i$ at each site"
    return panels(draw, sites, title, "$\\omega_i$", (label, "basis $i$"))


def similarity(table: np.ndarray, sites: Sequence[str], names: Sequence[str], label: str) -> Figure:
    """Cosine similarity [S, N, N] of every site's weights between conditions, and the mean of all."""
    every = np.concatenate([table.mean(axis=0, keepdims=True), table])

    def draw(axes: Axes, k: int) -> Any:
        return heat_map(axes, every[k], names, names, Normalize(-1, 1), "RdBu_r")

    title = "Cosine similarity of the composition weights between conditions"
    return panels(draw, ["mean of all sites", *sites], title, "cosine similarity", (label, label))


def components(
    scores: np.ndarray, shares: np.ndarray, sites: Sequence[str], names: Sequence[str]
) -> Figure:
    """Two principal components [S, N, 2] of every site's weights, a path over the noise levels."""

    def draw(axes: Axes, k: int) -> Any:
        x, y = scores[k].T
        axes.plot(x, y, color="0.7", linewidth=0.8, zorder=1)
        dots = axes.scatter(x, y, c=np.arange(len(x)), s=10, cmap="viridis", zorder=2)
        axes.set_xlabel(f"component 1 ({shares[k, 0]:.0%})", fontsize=7)
        axes.set_ylabel(f"component 2 ({shares[k, 1]:.0%})", fontsize=7)
        return dots

    title = "Principal components of the composition weights (share of the variance)"
    figure = panels(draw, sites, title, NOISE)
    bar = figure.axes[-1]  # the colour bar's
    bar.set_yticks(*_ticks(names))
    return figure


def norms(
    by_level: np.ndarray,
    by_class: np.ndarray,
    base: np.ndarray,
    sites: Sequence[str],
    levels: Sequence[str],
    classes: Sequence[str],
) -> Figure:
    """Norm of the update over that of the weight, [S, N] and [S, K], and the latter's [S]."""
    figure = _figure(
        "Norm of the LoRA update beside the weight's", 12, 2.2 + 0.3 * max(6, len(sites))
    )
    widths = [4, 2, 1.5] if len(classes) > 1 else [4, 1.5]
    axes = figure.subplots(1, len(widths), width_ratios=widths, sharey=True)
    rows = [short(site) for site in sites]
    scale = Normalize(0, max(by_level.max(), by_class.max()) or 1.0)
    drawn = heat_map(axes[0], by_level, levels, rows, scale, "viridis", len(rows))
    axes[0].set_xlabel(NOISE)
    axes[0].set_title("over noise levels" + (", mean of classes" if len(classes) > 1 else ""))
    if len(classes) > 1:
        heat_map(axes[1], by_class, classes, rows, scale, "viridis", len(rows))
        axes[1].set_xlabel("class")
        axes[1].set_title("over classes, mean of levels")
    label = "$||\\sum_i \\omega_i B_i A_i||_F\\ /\\ ||W||_F$"
    figure.colorbar(drawn, ax=axes[:-1], label=label, pad=0.01)
    axes[-1].barh(np.arange(len(rows)), base, color="0.6")
    axes[-1].set_title("weight")
    axes[-1].set_xlabel("$||W||_F$")
    return figure


def ablation(
    whole: np.ndarray,
    off: np.ndarray,
    none: np.ndarray,
    sites: Sequence[str],
    levels: Sequence[str],
    title: str,
) -> Figure:
    """Loss per noise level: with all adapters [N], without each site's [S, N], without any [N]."""
    figure = _figure(title, 11, 5.2 + 0.3 * len(sites))
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 1 + 0.3 * len(sites)], sharex=True)
    top.plot(whole, marker="o", label="all adapters on")
    top.plot(none, marker="s", label="all adapters off")
    top.set_yscale("log")
    top.set_ylabel("training loss per pixel")
    top.grid(alpha=0.3)
    top.legend()
    change = 100 * (off / whole - 1)
    limit = max(np.abs(change).max(), 1.0)
    rows = [short(site) for site in sites]
    scale = SymLogNorm(1, vmin=-limit, vmax=limit)  # linear below 1 %
    drawn = heat_map(bottom, change, levels, rows, scale, "RdBu_r", len(rows))
    for (row, column), value in np.ndenumerate(change):
        dark = abs(scale(value) - 0.5) > 0.35
        text = f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.2g}"
        bottom.text(column, row, text, ha="center", va="center", color="w" if dark else "k", size=8)
    bottom.set_xticks(*_ticks(levels, len(levels)))
    bottom.set_xlabel(NOISE)
    bottom.set_title("change of the loss in % when one site's adapters are off")
    figure.colorbar(drawn, ax=bottom, label="change in %", pad=0.01)
    return figure


def between(
    canvases: Mapping[str, np.ndarray], ticks: Sequence[str], title: str, axis: str
) -> Figure:
    """Grids of samples, uint8 [H, W, C], one per route; a column per weight.

    Args:
        canvases: by route.
        ticks: names of the weights.
        title: of the figure.
        axis: what the weights are.
    """
    height, width = next(iter(canvases.values())).shape[:2]
    panel = max(4.5, 7 / len(canvases))  # inches
    figure = _figure(title, panel * len(canvases), panel * height / width + 1.1)
    axes = figure.subplots(1, len(canvases), squeeze=False)[0]
    at = (np.arange(len(ticks)) + 0.5) * width / len(ticks)
    for place, (route, canvas) in zip(axes, canvases.items(), strict=True):
        place.imshow(np.squeeze(canvas), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        place.set_title(f"through {route.replace('_', '-')}", fontsize=10)
        place.set_xticks(at, ticks, fontsize=7)
        place.set_yticks([])
    figure.supxlabel(axis, fontsize=10)
    return figure


def comparison(
    names: Sequence[str],
    changes: np.ndarray,
    by_level: np.ndarray,
    sigmas: np.ndarray,
    title: str,
) -> Figure:
    """Changes in percent with their intervals: one per kind, and one per kind and noise level.

    Args:
        names: of the kinds, K.
        changes: mean, low and high [K, 3].
        by_level: the same at each noise level [K, N, 3].
        sigmas: noise levels [N].
        title: of the figure.
    """
    figure = _figure(title, 11, 1.6 + max(0.42 * len(names), 2.2))
    whole, levels = figure.subplots(1, 2)
    colours = [f"C{k}" for k in range(len(names))]
    for k, (mean, low, high) in enumerate(changes):
        row = len(names) - 1 - k
        whole.errorbar(
            mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=colours[k], capsize=3
        )
        levels.plot(sigmas, by_level[k, :, 0], color=colours[k])
        levels.fill_between(
            sigmas, by_level[k, :, 1], by_level[k, :, 2], color=colours[k], alpha=0.15, linewidth=0
        )
    whole.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    whole.set_ylim(-0.6, len(names) - 0.4)
    whole.set_xlabel("change in % (left is better)")
    levels.set_xscale("log")
    levels.set_xlabel("noise level $\\sigma$ (quantiles of training)")
    levels.set_ylabel("change in %")
    whole.axvline(0, color="grey", linewidth=0.8)
    levels.axhline(0, color="grey", linewidth=0.8)
    return figure
