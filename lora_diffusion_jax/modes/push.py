"""A run as a folder to publish, and on the Hugging Face Hub: weights, config, model card, samples."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_diffusion_jax import default_config, files, interop, lora
from lora_diffusion_jax.data import hf_source
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.factory.networks import num_classes
from lora_diffusion_jax.factory.pretrained import Pretrained
from lora_diffusion_jax.interop import hub
from lora_diffusion_jax.modes.sample import check_outside_runs
from lora_diffusion_jax.pages import collect
from lora_diffusion_jax.training import workdir
from lora_diffusion_jax.training.writers import COMMAND
from lora_diffusion_jax.untrusted import read_json

CARD, CONFIG, GRID = "README.md", "config.json", "samples.png"
# Fields whose paths are those of one machine: their last part is published.
_PATHS = (
    *("data.data_dir", "data.path", "data.eval_path", "eval.reference", "eval.inception"),
    *("guidance.workdir", "init_from"),
)
_LEFT_OUT = ("data.fingerprint", "log.wandb_project", "log.wandb_entity", "log.wandb_mode")
_MANY = 20  # classes that a card lists


def push(
    run: Pretrained,
    directory: Path,
    *,
    weights: str,
    repo: str = "",
    out: str = "",
    license_name: str = "",
    private: bool = False,
    overwrite: bool = False,
) -> str:
    """Writes a run as a folder to publish, and uploads it if a repository is named.

    Args:
        run: the network, its weights and its config.
        directory: the run's.
        weights: ema or raw: which weights these are.
        repo: OWNER/NAME on the Hub, or ''.
        out: the folder; '' is a temporary one.
        license_name: an identifier of the Hub, such as apache-2.0; '' states none.
        private: of a repository that is created.
        overwrite: replace files in `out`.

    Returns:
        Where it is.

    Raises:
        UserError: neither repo nor out, a folder that is not empty, or the upload fails.
    """
    if not (repo or out):
        raise UserError("--mode=push needs --repo=OWNER/NAME, --out=FOLDER, or both.")
    if repo:
        hub.check_repo(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out or temporary)
        if out:
            _check_folder(folder, overwrite)
        write(run, directory, folder, weights=weights, repo=repo, license_name=license_name)
        if not repo:
            return out
        message = f"{weights} weights of step {run.step}"
        return hub.upload(folder, repo, message, private=private)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not (folder / hub.WEIGHTS).is_file():  # of an earlier push, which has a config.json as well
        check_outside_runs(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"--out={folder} is not empty; choose another folder, or add --overwrite to replace files in it."
        )


def write(
    run: Pretrained,
    directory: Path,
    folder: Path,
    *,
    weights: str,
    repo: str = "",
    license_name: str = "",
) -> None:
    """Writes the folder: WEIGHTS of `hub`, CONFIG, CARD, and GRID if the run has drawn one."""
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / hub.WEIGHTS
    interop.export_network(path, run.variables, run.config, weights=weights)  # type: ignore[arg-type]
    described = path.with_suffix(".json")
    facts = {**read_json(described, infinite=True), "step": run.step}
    facts["config"] = published(run.config)
    seen = collect.collect(collect.Source(directory.name, directory, {}))
    with files.disk_errors(folder):
        described.unlink()
        files.write_text(folder / CONFIG, json.dumps(facts, indent=2) + "\n")
        grid = directory / seen.samples if seen.samples else None
        (folder / GRID).unlink(missing_ok=True)
        if grid is not None:
            shutil.copyfile(grid, folder / GRID)
        files.write_text(
            folder / CARD,
            card(
                run,
                weights=weights,
                where=f"hf://{repo}" if repo else hub.WEIGHTS,
                title=repo.partition("/")[2] or directory.name,
                metrics=seen.metrics,
                images=(run.step or 0) * run.config.train.batch_size,
                command=training_command(directory),
                license_name=license_name,
                has_grid=grid is not None,
            ),
        )


def published(config: ConfigDict) -> dict[str, Any]:
    """A config without what belongs to one machine or account."""
    config = config.copy_and_resolve_references()
    base = default_config.base()
    with config.unlocked():
        for field in (*_PATHS, *_LEFT_OUT):
            group, _, name = field.rpartition(".")
            owner, usual = (c[group] if group else c for c in (config, base))
            if field in _LEFT_OUT:
                owner[name] = usual[name]
            elif not _is_public(owner[name]):
                owner[name] = Path(owner[name]).name
    return config.to_dict()


def _is_public(path: str) -> bool:
    return path.startswith(files.HUB)


def training_command(directory: Path) -> str:
    """The command that trained a run, without the paths of its machine; '' if it is not known."""
    path = directory / COMMAND
    if not path.is_file():
        return ""
    words = shlex.split(path.read_text(errors="replace"))
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return shlex.join(["lora-diffusion", *map(_without_path, words[first:])])


def _without_path(argument: str) -> str:
    name, equals, value = argument.partition("=")
    path = value if equals else argument
    if not path.startswith(("/", "~", "./", "../", "$")):
        return argument
    kept = f"{'configs/' if path.endswith('.py') else ''}{Path(path).name}"
    return f"{name}={kept}" if equals else kept


# The model card.


def card(
    run: Pretrained,
    *,
    weights: str,
    where: str,
    title: str,
    metrics: Mapping[str, float | None],
    images: int,
    command: str,
    license_name: str = "",
    has_grid: bool = False,
) -> str:
    """The model card as Markdown, with the metadata that the Hub reads before it."""
    config = run.config
    parts = [
        _metadata(config, license_name),
        f"# {_plain(title)}",
        _opening(config),
        f"![samples]({GRID})" if has_grid else "",
        "## Use",
        _use(config, where),
        "## Network",
        _table(("", ""), _facts(run, weights, images)),
        "## Results",
        _results(metrics),
        "## Training",
        _training(config, command),
        "## Licence",
        f"`{_plain(license_name)}`" if license_name else "The owner has not stated a licence.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(config: ConfigDict, license_name: str) -> str:
    """YAML; every value is written as JSON, which YAML includes."""
    fields: dict[str, Any] = {
        "library_name": "lora_diffusion_jax",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "jax", "flax"],
    }
    if config.lora.mode != "baseline":
        fields["tags"] += ["lora", f"lora-{config.lora.adapter}"]
    if license_name:
        fields["license"] = license_name
    if data := hf_source.repo_of(config.data.name):
        fields["datasets"] = [data]
    if base := hub.repo_of(config.init_from):
        fields["base_model"] = base
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _opening(config: ConfigDict) -> str:
    how = {
        "with_lora": f"conditioned low-rank adapters ({config.lora.adapter}) on its attention layers",
        "only_lora": f"conditioned low-rank adapters ({config.lora.adapter}) in place of scale-and-shift",
        "baseline": "scale-and-shift conditioning, without adapters",
    }[config.lora.mode]
    classes = num_classes(config)
    kind = f"{classes}-class conditional" if classes else "unconditional"
    return (
        f"A {kind} diffusion model ({config.model.name}, {config.precond.name}) with {how}, trained with "
        "lora_diffusion_jax."
    )


def _use(config: ConfigDict, where: str) -> str:
    one = " --class_id=0" if num_classes(config) else ""
    return (
        "```\n"
        f"lora-diffusion --mode=sample --workdir={where} --seeds=0-15{one} --out=samples.npz\n"
        f"lora-diffusion --mode=train --config=... --workdir=DIR --config.init_from={where}\n"
        "```\n\n"
        "```python\n"
        "from lora_diffusion_jax.interop import load_pretrained\n\n"
        f'p = load_pretrained("{where}")\n'
        "p.denoiser.apply(p.variables, x, sigma, class_labels)  # D(x; sigma, c)\n"
        "```"
    )


def _facts(run: Pretrained, weights: str, images: int) -> list[tuple[str, str]]:
    config, params = run.config, run.variables["params"]
    adapters = lora.split(params)[1]
    height, width = config.data.image_size, config.data.image_width or config.data.image_size
    facts = [
        ("weights", f"{weights} of step {run.step:,}, after {images:,} images"),
        ("parameters", f"{lora.count(params):,}, of which {lora.count(adapters):,} in adapters"),
        ("data", f"{height}x{width}, {config.data.channels} channels{_values(config)}"),
    ]
    if config.lora.mode != "baseline":
        sites = lora.list_sites(params)
        shape = f"rank {config.lora.rank}, {config.lora.bases} bases"
        facts.append(("adapters", f"{config.lora.adapter}, {shape}, {len(sites)} sites"))
    if classes := num_classes(config):
        names = config.data.class_names[:_MANY]
        listed = ", ".join(map(_plain, names)) + (", ..." if classes > _MANY else "")
        facts.append(("classes", f"{classes:,}" + (f": {listed}" if names else "")))
    return facts


def _values(config: ConfigDict) -> str:
    if not config.data.floats:
        return ", 8 bits"
    mean, std = config.data.mean or (0.0,), config.data.std or (1.0,)
    return f", floats (mean {mean}, std {std})"


def _results(metrics: Mapping[str, float | None]) -> str:
    rows = [
        (f"`{_plain(name)}`", f"{value:.5g}")
        for name, value in metrics.items()
        if value is not None
    ]
    if not rows:
        return "Not measured."
    return _table(("metric", "value"), rows) + (
        "\n\n`fid_50k` is FID of 50,000 samples; `fd_classifier_*` is a distance in features of a small "
        "classifier of the same data, and no FID."
    )


def _training(config: ConfigDict, command: str) -> str:
    data = config.data.name or Path(config.data.path).name or "not recorded"
    lines = [f"Data set: `{_plain(data)}`, split `{_plain(config.data.split)}`."]
    if config.init_from:
        start = config.init_from if _is_public(config.init_from) else Path(config.init_from).name
        frozen = ", which stays frozen" if config.train.freeze_base else ""
        lines.append(f"Started from `{_plain(start)}`{frozen}.")
    if command:
        lines.append(f"```\n{command.replace('```', '')}\n```")
    fixed, _ = workdir.differences(default_config.base().to_dict(), published(config))
    left_out = {*_LEFT_OUT, "data.class_names"}
    rows = [
        (f"`{field}`", f"`{_plain(new, 200)}`")
        for field, (_, new) in fixed.items()
        if field not in left_out
    ]
    if rows:
        lines.append(
            f"Fields of its config that are not the defaults (all are in `{CONFIG}`):\n\n"
            + _table(("field", "value"), rows)
        )
    return "\n\n".join(lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any, limit: int = 80) -> str:
    """Text of a data set or a config, which must not become markup."""
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = printable(shown, limit)
    return (
        text.replace("|", "/")
        .replace("<", "‹")
        .replace("`", "'")
        .replace("[", "(")
        .replace("]", ")")
    )
