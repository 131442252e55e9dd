"""One flipped bit in any file of a workdir or its caches is reported, or changes nothing."""

import collections
import itertools
import shutil

import numpy as np
import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.evaluation.collect import FeatureSet, Partial
from lora_diffusion_jax.evaluation.features import tree_hash
from lora_diffusion_jax.modes import doctor
from lora_diffusion_jax.npz import read_npz, write_npz
from lora_diffusion_jax.training import checkpoint, workdir, writers

# What no program reads again: a lock's text, tables and pictures for people.
FOR_PEOPLE = (".lock", "parameters.txt", "command.txt", "events.", ".png")
IDENTITY = {"seeds": "0-9"}
ROWS = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    """A run with results, partial sums, and a cached feature network."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(workdir, root / "run")
    for seed in range(3):
        record = {"metric": "fid_10", "value": 1.5 + seed, "seeds": str(seed), "step": 6}
        results.append(results.results_file(root / "run"), record)
    found = FeatureSet(4, keep_rows=True)
    found.add(ROWS, ROWS)
    partial = Partial(root / "run" / results.FOLDER, IDENTITY)
    partial.lock().release()
    partial.save(found)
    write_npz(root / "cache" / "features.npz", {"dense/kernel": ROWS, "dense/bias": ROWS[0]})
    return root


def everything(root):
    """What the programs read of a run and its caches, and what the doctor says."""
    run = root / "run"
    step, weights = checkpoint.open_for_reading(run)
    results.repair(results.results_file(run))
    found = FeatureSet(4, keep_rows=True)
    Partial(run / results.FOLDER, IDENTITY).restore(found)
    return {
        "config": workdir.read_config(run),
        "weights": (step, tree_hash(weights)),
        "metrics": writers.read_metrics(run),
        "results": results.read(results.results_file(run)),
        "partial": tree_hash(found.moments.state()),
        "rows": tree_hash(found.rows),
        "cache": tree_hash(read_npz(root / "cache" / "features.npz", lambda n: True, "")[1]),
        "doctor": list(doctor.damaged(run)),
    }


def kind_of(path, whole):
    """A checkpoint's part, or the file; what nobody reads again is marked."""
    parts = path.relative_to(whole).parts
    kind = "/".join((*parts[:2], *parts[3:4]) if "checkpoints" in parts else parts)
    people = any(path.name.startswith(x) or path.name.endswith(x) for x in FOR_PEOPLE)
    return kind + " (for people)" * people


def flip_bits(whole, tmp_path, capsys, count, seed):
    """Flips `count` bits, one at a time, in one kind of file after the other; returns their outcomes."""
    rng = np.random.default_rng(seed)
    kinds = collections.defaultdict(list)
    for path in sorted(p for p in whole.rglob("*") if p.is_file() and p.stat().st_size):
        kinds[kind_of(path, whole)].append(path.relative_to(whole))
    expected, table = everything(whole), collections.defaultdict(collections.Counter)
    assert not expected["doctor"]
    for kind, n in zip(itertools.cycle(kinds), range(count), strict=False):
        root = tmp_path / str(n)
        shutil.copytree(whole, root)
        path = root / rng.choice(kinds[kind])
        data = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        checkpoint._tell_unverified.cache_clear()
        workdir._tell_changed.cache_clear()
        capsys.readouterr()
        try:
            found = everything(root)
            told = bool(found["doctor"] or "".join(capsys.readouterr()))
            outcome = "told" if told else "harmless" if found == expected else "SILENT"
        except UserError:
            outcome = "told"
        table[kind][outcome] += 1
        shutil.rmtree(root)
    with capsys.disabled():
        print(f"\n{'file':60} told harmless SILENT")
        for kind, row in sorted(table.items()):
            print(f"{kind:60} {row['told']:4} {row['harmless']:8} {row['SILENT']:6}")
    return table


def check(table):
    assert all(not row["SILENT"] for row in table.values())
    assert all(row["told"] for kind, row in table.items() if "run/checkpoints" in kind)


def test_twenty_flipped_bits(whole, tmp_path, capsys):
    check(flip_bits(whole, tmp_path, capsys, 20, seed=0))


@pytest.mark.slow
def test_a_hundred_flipped_bits(whole, tmp_path, capsys):
    check(flip_bits(whole, tmp_path, capsys, 100, seed=1))
