"""What the adapters of a run do: pictures, and the numbers behind them in one npz."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_diffusion_jax import files, generate, outputs
from lora_diffusion_jax.analysis import composition, plots, routes, updates
from lora_diffusion_jax.data.image_source import ImageSource
from lora_diffusion_jax.diffusion.objective import Objective
from lora_diffusion_jax.errors import NotThereError, UserError
from lora_diffusion_jax.evaluation.detectors import detector_for_source
from lora_diffusion_jax.evaluation.features import Detector, extract
from lora_diffusion_jax.factory.data import complete, open_source
from lora_diffusion_jax.factory.networks import has_map, is_pictures, num_classes
from lora_diffusion_jax.factory.objectives import refuse_changes
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.factory.training import build_generator, build_mesh
from lora_diffusion_jax.lora import CONDITIONS, Adapted, list_sites
from lora_diffusion_jax.modes.sample import choose_classes, choose_images, make_folder
from lora_diffusion_jax.npz import write_npz
from lora_diffusion_jax.processes.interrupts import pause_point
from lora_diffusion_jax.training.step import to_float, to_labels

USUAL_NUM = 32  # images for the losses, without --num
LEVELS = 64  # noise levels of the composition weights
LOSS_LEVELS = 8
MAX_CLASSES = 10  # of which composition weights are shown
WEIGHTS = np.linspace(-0.5, 1.5, 9)  # of conditions in between and beyond
USUAL_SEEDS = tuple(range(8))  # rows of their grids
NPZ = "analysis.npz"
PICTURES = (
    *("omega", "omega_classes", "similarity", "pca", "norms", "ablation"),
    *("classes", "noise", "guidance"),
)
GUIDED = 7  # weights from 1 on, of guidance as extrapolation


@dataclasses.dataclass
class Found:
    """What an analysis has found so far.

    Attributes:
        arrays: for the npz, by name.
        pictures: figures by name.
        record: key figures, for a line of JSON.
    """

    arrays: dict[str, np.ndarray]
    pictures: dict[str, Any]
    record: dict[str, Any]


def analyze(
    run: Pretrained,
    out: Path,
    *,
    num: int | None = None,
    classes: str | None = None,
    noise_factor: float | None = None,
    guidance: float | None = None,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes pictures and `analysis.npz` to a folder; returns the key figures.

    Args:
        run: the network, its weights and its config.
        out: the folder.
        num: training images for the losses; None: USUAL_NUM, or all if they are fewer; 0: no losses.
        classes: two classes, `3,8` or names, between which samples are drawn; None: none are.
        noise_factor: samples are drawn with a condition of so many times the noise level; None: none are.
        guidance: samples are drawn with a class's condition led away from that of no class, up to this
            weight; None: none are.
        seeds: of these samples, a row each; None: USUAL_SEEDS.
        overwrite: replace the files of an earlier analysis.

    Raises:
        UserError: the network has no adapters, an argument does not suit it, or `out` cannot be written.
        Interrupted: by a signal, inside `with Interrupts()`.
    """
    if not isinstance(run.denoiser.model, Adapted):
        raise UserError(
            "This run has no adapters to analyze (lora.mode=baseline); name one with lora.mode=with_lora or "
            "only_lora."
        )
    refuse_changes(run.config, "--mode=analyze")
    pair = None if classes is None else choose_pair(run, classes)
    if noise_factor is not None and not (0 < noise_factor < float("inf") and noise_factor != 1):
        raise UserError(
            f"--noise_factor={noise_factor:g}; it must be a positive number other than 1, such as 2."
        )
    if guidance is not None:
        check_guidance(run, guidance)
    for asked, by_class in ((pair or guidance, True), (noise_factor, False)):
        if asked:
            routes_of(run, by_class)
    samples = bool(pair or noise_factor or guidance)
    if samples and not is_pictures(run.config):
        raise UserError(
            "--classes, --noise_factor and --guidance compare pictures, but this run's data are an array, "
            "for which there are no features; leave them out."
        )
    names = [NPZ, *(f"{name}.png" for name in PICTURES)]
    make_folder(out, names, "an analysis", overwrite)
    checked = generate.check_seeds(USUAL_SEEDS if seeds is None else seeds) if samples else None
    source = training_images(run) if num != 0 or samples else None
    leave_out = ", or 0 to leave the losses out"
    chosen = (
        None
        if source is None or num == 0
        else choose_images(source, num, USUAL_NUM, 1, "training", leave_out)
    )
    found = Found({}, {}, {})
    compose(run, found)
    if chosen is not None and source is not None:
        lose(run, source, chosen, found)
    if checked is not None and source is not None:
        detector = detector_for_source(source, "auto")
        if pair:
            draw_between(run, "classes", checked, detector, found, pair)
        if noise_factor:
            first = pair[:1] if pair else (0,) if num_classes(run.config) else ()
            draw_between(run, "noise", checked, detector, found, first, noise_factor)
        if guidance:
            draw_guided(run, checked, detector, found, pair[0] if pair else 0, guidance)
    return write(out, found, overwrite)


def choose_pair(run: Pretrained, classes: str) -> tuple[int, int]:
    """The two classes of --classes.

    Raises:
        UserError: not two classes of this network.
    """
    count, names = num_classes(run.config), tuple(run.config.data.class_names)
    parts = classes.split(",")
    if not count or len(parts) != 2:
        why = (
            "this network is unconditional; leave it out" if not count else "give two, such as 3,8"
        )
        raise UserError(f"--classes={classes}; {why}.")
    first, second = (choose_classes(part.strip(), 1, count, names) for part in parts)
    for number in (first, second):
        if not (isinstance(number, int) and number < count):
            raise UserError(f"--classes={classes}; classes run from 0 to {count - 1}.")
    if first == second:
        raise UserError(f"--classes={classes}; the two classes must differ.")
    return first, second  # type: ignore[return-value]  # both are int


def training_images(run: Pretrained) -> ImageSource:
    """The run's data set.

    Raises:
        UserError: there is none, or it does not fit the network.
    """
    try:
        source = open_source(run.config)
    except NotThereError as error:
        raise NotThereError(
            f"{error} Without one, analyze with --num=0 and neither --classes nor --noise_factor."
        ) from error
    complete(run.config, source)
    return source


# Composition weights and norms.


def compose(run: Pretrained, found: Found) -> None:
    """Adds composition weights, their similarity and components, and the norms of the updates."""
    denoiser, variables = run.denoiser, run.variables
    sigmas = composition.noise_levels(denoiser.precond, LEVELS)
    count = min(num_classes(run.config), MAX_CLASSES)
    labels = jnp.eye(num_classes(run.config))[:count] if count else None
    pause_point()
    weights = composition.composition_table(denoiser, variables, sigmas, labels)
    sites, levels = list_sites(variables["params"]), plots.sigma_names(sigmas)
    class_names = [str(k) for k in range(count)]
    found.arrays |= {"sites": np.array(sites), "sigmas": sigmas, "classes": np.arange(count)}
    found.record |= {"adapter": run.config.lora.adapter, "sites": len(sites)}
    for name, by_site in composition.by_adapter(weights).items():
        suffix = f"_{name}" if name else ""
        table = np.stack([by_site[site] for site in sites])  # [S, N, K, m]
        found.arrays[f"omega{suffix}"] = table
        _picture(found, suffix, table, sites, levels, class_names)
    pause_point()
    flat = jax.tree.map(lambda w: w.reshape(-1, w.shape[-1]), weights)
    norms = updates.update_norms(variables["params"], flat)
    norms_of_base = updates.base_norms(variables["params"])
    base = np.array([norms_of_base[site] for site in sites])
    update = np.stack([norms[site] for site in sites]).reshape(len(sites), len(sigmas), -1)
    ratio = update / np.where(base > 0, base, np.inf)[:, None, None]  # 0 beside a weight of zeros
    found.arrays |= {"update_norm": update, "base_norm": base}
    found.pictures["norms"] = plots.norms(
        ratio.mean(axis=2), ratio.mean(axis=1), base, sites, levels, class_names
    )
    highest = np.unravel_index(np.argmax(ratio), ratio.shape)
    found.record |= {
        "largest_norm_ratio": float(ratio.max()),
        "largest_norm_ratio_site": sites[highest[0]],
    }


def _picture(
    found: Found,
    suffix: str,
    table: np.ndarray,
    sites: Sequence[str],
    levels: Sequence[str],
    classes: Sequence[str],
) -> None:
    """Pictures of one adapter's weights [S, N, K, m] over what they depend on."""
    over_levels, over_classes = (np.ptp(table, axis=axis).max() > 0 for axis in (1, 2))
    if over_levels:
        mean = table.mean(axis=2)
        cosine = composition.cosine_similarity(mean)
        pairs = [composition.principal_components(omega) for omega in mean]
        scores, shares = (np.stack(part) for part in zip(*pairs, strict=True))
        found.arrays |= {f"similarity{suffix}": cosine, f"pca{suffix}": scores}
        found.arrays[f"pca_share{suffix}"] = shares
        found.pictures["omega"] = plots.omega(mean, sites, levels, plots.NOISE)
        found.pictures["similarity"] = plots.similarity(cosine, sites, levels, plots.NOISE)
        found.pictures["pca"] = plots.components(scores, shares, sites, levels)
        found.record |= {
            "similarity_neighbours": float(np.diagonal(cosine, 1, 1, 2).mean()),
            "similarity_farthest": float(cosine[:, 0, -1].mean()),
        }
    if over_classes:
        mean = table.mean(axis=1)
        cosine = composition.cosine_similarity(mean)
        found.arrays[f"similarity_classes{suffix}"] = cosine
        found.pictures["omega_classes"] = plots.omega(mean, sites, classes, "class")
        upper = np.triu_indices(len(classes), 1)
        found.record["similarity_classes"] = float(cosine[:, *upper].mean())


# Losses.


def lose(run: Pretrained, source: ImageSource, chosen: np.ndarray, found: Found) -> None:
    """Adds the loss per noise level with all adapters, without each site's, and without any."""
    batch = source.read(chosen.tolist())
    images = to_float(jnp.asarray(batch["image"]))
    sigmas = composition.noise_levels(run.denoiser.precond, LOSS_LEVELS)
    loss = updates.loss_by_level(
        Objective(run.denoiser),
        images,
        to_labels(jnp.asarray(batch["label"]), num_classes(run.config)),
        updates.noise_of(chosen, images.shape[1:]),
        sigmas,
    )
    whole, off, none = updates.ablate(loss, run.variables, pause_point)  # [N, B], [S, N, B], [N, B]
    found.arrays |= {"loss_sigmas": sigmas, "loss": whole, "loss_without_all": none}
    found.arrays["loss_without_site"] = off
    sites = list_sites(run.variables["params"])
    mean, mean_off, mean_none = (part.mean(axis=-1) for part in (whole, off, none))
    title = f"Loss with and without adapters ({len(chosen)} training images)"
    levels = plots.sigma_names(sigmas)
    found.pictures["ablation"] = plots.ablation(mean, mean_off, mean_none, sites, levels, title)
    change = mean_off / mean - 1
    highest = np.unravel_index(np.argmax(change), change.shape)
    found.record |= {
        "num": len(chosen),
        "largest_loss_increase": float(change.max()),
        "largest_loss_increase_site": sites[highest[0]],
        "loss_increase_without_all": float((mean_none / mean - 1).mean()),
    }


# Conditions in between.


def routes_of(run: Pretrained, by_class: bool) -> tuple[str, ...]:
    """The routes by which a condition reaches the network: if it has but one, that alone.

    Raises:
        UserError: it has none.
    """
    sees = CONDITIONS[run.config.lora.adapter]
    adapters = "map" in sees or ("class" if by_class else "time") in sees
    affine = run.config.lora.mode == "with_lora" and has_map(run.config)
    found = routes.ROUTES if adapters and affine else routes.ROUTES[:1] if adapters else ()
    found = found or (routes.ROUTES[1:2] if affine else ())
    if not found:
        raise UserError(
            f"Nothing in this network depends on the {'class' if by_class else 'noise level'} "
            f"(lora.mode={run.config.lora.mode}, lora.adapter={run.config.lora.adapter}); leave out "
            f"{'--classes' if by_class else '--noise_factor'}."
        )
    return found


def draw_between(
    run: Pretrained,
    name: str,
    seeds: np.ndarray,
    detector: Detector,
    found: Found,
    classes: tuple[int, ...],
    factor: float = 1.0,
) -> None:
    """Adds samples along each route: from one class to another, or from the true noise level to another.

    Args:
        run: the network.
        name: of the picture and the arrays.
        seeds: one row of the picture each.
        detector: of the features in which smoothness is measured.
        found: gets picture, arrays and measures.
        classes: two, or the one of all samples; () for an unconditional network.
        factor: times which the second condition's noise level is the true one.
    """
    one_hot = np.eye(num_classes(run.config), dtype=np.float32)
    start, end = (one_hot[classes[0]], one_hot[classes[-1]]) if classes else (None, None)
    pair = classes if len(classes) == 2 else None
    path = f"1 to {factor:g} times the noise level"
    path = f"class {classes[0]} to class {classes[1]}" if pair else path
    one = f" (class {classes[0]})" if len(classes) == 1 else ""
    found.arrays |= {"between_weights": WEIGHTS, "between_seeds": seeds}
    walk = Walk(
        name,
        WEIGHTS,
        WEIGHTS,
        functools.partial(
            routes.condition_rows, weights=WEIGHTS, start=start, end=end, factor=factor
        ),
        f"Condition from {path}{one}; a row is a seed",
        "weight: 0 is the first condition, 1 the second",
        pair or (),
    )
    draw_walk(run, walk, routes_of(run, pair is not None), seeds, detector, found)


def check_guidance(run: Pretrained, weight: float) -> None:
    """Raises UserError for a weight that leads nowhere, or a network without classes."""
    if not num_classes(run.config):
        raise UserError("--guidance leads away from no class, but this network is unconditional.")
    if not 1 < weight < float("inf"):
        raise UserError(f"--guidance={weight:g}; it must be greater than 1, such as 4.")


def draw_guided(
    run: Pretrained,
    seeds: np.ndarray,
    detector: Detector,
    found: Found,
    number: int,
    largest: float,
) -> None:
    """Adds samples under w c + (1 - w) 0, of a class's label c and that of no class, along each route.

    Classifier-free guidance extrapolates what the network returns for the two labels, this the
    condition itself; the route that is not taken has the class's.

    Args:
        run: the network.
        seeds: one row of the picture each.
        detector: of the features in which smoothness is measured.
        found: gets picture, arrays and measures.
        number: the class.
        largest: w goes from 1 to it.
    """
    one_hot = np.eye(num_classes(run.config), dtype=np.float32)
    weights = np.linspace(1, largest, GUIDED)
    found.arrays |= {"guidance_weights": weights, "guidance_seeds": seeds}
    walk = Walk(
        "guidance",
        weights,
        (weights - 1) / (largest - 1),
        functools.partial(routes.guided_rows, weights=weights, label=one_hot[number]),
        f"Condition of class {number} led away from that of no class; a row is a seed",
        "weight: 1 is the class itself",
        (number,),
    )
    draw_walk(run, walk, routes_of(run, by_class=True), seeds, detector, found)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A path of conditions.

    Attributes:
        name: of the picture and the arrays.
        weights: of the conditions, [W].
        position: of each on the path, [W]; smoothness is measured from 0 to 1.
        rows: route -> rows for `routes.TwoConditions`, one per weight.
        title: of the picture.
        axis: what the weights are.
        classes: by a classifier of the data, the share of samples of each is measured.
    """

    name: str
    weights: np.ndarray
    position: np.ndarray
    rows: Callable[[str], np.ndarray]
    title: str
    axis: str
    classes: Sequence[int]


def draw_walk(
    run: Pretrained,
    walk: Walk,
    taken: Sequence[str],
    seeds: np.ndarray,
    detector: Detector,
    found: Found,
) -> None:
    """Adds samples, features and measures of a path of conditions, by each of the routes taken."""
    ticks, classes = [f"{w:g}" for w in walk.weights], num_classes(run.config)
    canvases, measures = {}, {}
    for route in taken:
        images = sample_rows(run, walk.rows(route), seeds, pause_point)  # [W, N, H, W, C]
        parts = list(extract(detector, images.reshape(-1, len(seeds), *images.shape[2:])))
        features, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
        features = features.reshape(*images.shape[:2], -1)
        found.arrays |= {
            f"{walk.name}_images_{route}": images,
            f"{walk.name}_features_{route}": features,
        }
        canvases[route] = outputs.grid(
            images.swapaxes(0, 1).reshape(-1, *images.shape[2:]), len(walk.weights)
        )
        measures[route] = {
            kind: routes.smoothness(points, walk.position)
            for kind, points in (("pixels", images), ("features", features))
        }
        if walk.classes and detector.has_classes and logits.shape[-1] == classes:
            named = logits.argmax(axis=-1).reshape(images.shape[:2])
            shares = np.stack([(named == k).mean(axis=1) for k in walk.classes], axis=1)
            found.arrays[f"{walk.name}_assigned_{route}"] = shares  # [W, classes]
            assigned = "assigned_to_second" if len(walk.classes) == 2 else "assigned"
            measures[route][assigned] = dict(zip(ticks, shares[:, -1].tolist(), strict=True))
    found.pictures[walk.name] = plots.between(canvases, ticks, walk.title, walk.axis)
    found.record[walk.name] = {"features": detector.name, **measures}


def sample_rows(
    run: Pretrained, rows: np.ndarray, seeds: np.ndarray, between: Callable[[], None]
) -> np.ndarray:
    """Samples uint8 [R, N, H, W, C] of each seed under each row of `routes.condition_rows`.

    Raises:
        UserError: an image is not finite.
    """
    plain = build_generator(run.config, run.denoiser, build_mesh(run.config))
    two = routes.TwoConditions(run.denoiser)
    generator = dataclasses.replace(
        plain,
        denoiser=two,  # type: ignore[arg-type]  # it is called alike
        bind_shared=None,  # it folds its adapters itself
        num_classes=two.num_classes,
        batch_size=min(plain.batch_size, len(seeds)),
    )
    images = []
    for row in rows:  # a batch has one condition
        labels = np.tile(row, (len(seeds), 1))
        for batch in generator.batches(run.variables, seeds, labels, between=between):
            batch.check_finite()
            images.append(batch.images)
    return np.concatenate(images).reshape(len(rows), len(seeds), *plain.image_shape)


def write(out: Path, found: Found, overwrite: bool) -> dict[str, Any]:
    """Writes pictures and arrays; with `overwrite`, pictures of an earlier analysis are removed."""
    with files.disk_errors(out):
        for name in PICTURES:
            if name in found.pictures:
                plots.write(found.pictures[name], out / f"{name}.png")
            elif overwrite:
                (out / f"{name}.png").unlink(missing_ok=True)
    write_npz(out / NPZ, found.arrays)
    return found.record | {"out": str(out), "files": [*(f"{n}.png" for n in found.pictures), NPZ]}
