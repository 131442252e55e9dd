"""eval_fid.py on runs in an object store."""

import json

import pytest

from lora_diffusion_jax import remote
from tests.evaluation.conftest import detector, digits  # noqa: F401 (fixtures)
from tests.evaluation.test_eval_fid import call, reference, write_run  # noqa: F401 (fixtures)


def put(store, folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(str(path), f"{url}/{path.relative_to(folder)}")


@pytest.mark.slow
def test_gen_gives_the_number_of_a_local_run_and_keeps_it_there(
    base, store, tmp_path, capsys, reference  # noqa: F811
):  # fmt: skip
    run = write_run(tmp_path / "run", steps=(10,))
    put(store, run, base)
    arguments = [f"--ref={reference}", "--num=64"]
    local = call(capsys, "gen", f"--workdir={run}", *arguments)[1][0]
    there = call(capsys, "gen", f"--workdir={base}", *arguments)[1][0]
    assert there["value"] == local["value"]
    assert there["workdir"] == base
    lines = store.cat_file(f"{base}/evaluation/results.jsonl").splitlines()
    assert json.loads(lines[-1])["value"] == local["value"]


@pytest.mark.slow
def test_all_finds_the_runs_below_and_measures_each_once(
    base, store, tmp_path, capsys, reference  # noqa: F811
):  # fmt: skip
    for name, steps in (("a", (10,)), ("deeper/b", (5, 10))):
        put(store, write_run(tmp_path / name, steps=steps), f"{base}/{name}")
    command = ["all", f"--workdir={base}", f"--ref={reference}", "--num=64"]
    status, records, text = call(capsys, *command)
    assert status == 0, text
    assert sorted((r["workdir"], r["step"]) for r in records) == [
        (f"{base}/a", 10),
        (f"{base}/deeper/b", 5),
        (f"{base}/deeper/b", 10),
    ]
    assert f"table and plots: {base}/evaluation" in text
    assert store.isfile(f"{base}/evaluation/table.txt")
    remote.close()
    _, again, _ = call(capsys, *command)
    assert again == records  # read, not measured
    status, _, text = call(capsys, "gen", f"--workdir={base}", f"--ref={reference}", "--num=64")
    assert status == 2
    assert f"{base} is not a run but contains some" in text
