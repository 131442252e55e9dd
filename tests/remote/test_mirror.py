import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_diffusion_jax import remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.remote import mirror
from tests.modes.running import run
from tests.remote.servers import BUCKET


def test_files_go_to_the_store_and_come_to_another_mirror(base):
    folder = Path(remote.local(base))
    contents = {"config.json": b"{}", "metrics.jsonl": b"1\n2\n", "checkpoints/3/d": bytes(999)}
    contents["empty"] = b""
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    remote.push(folder)
    assert remote.listing(folder) == {name: len(data) for name, data in contents.items()}
    remote.close()
    assert not folder.exists()

    folder = Path(remote.local(base))
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == contents.keys() - {"checkpoints/3/d"}  # which is fetched when it is opened
    remote.fetch(folder, ["checkpoints/3/d"])
    assert {name: (folder / name).read_bytes() for name in contents} == contents


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\n\r", b"\0", b""])
def test_every_byte_comes_back(base, end):
    folder = Path(remote.local(base))
    folder.mkdir(parents=True)
    content = bytes(range(256)) + end
    (folder / "config.json").write_bytes(content)
    remote.push(folder / "config.json")
    remote.close()
    assert (Path(remote.local(base)) / "config.json").read_bytes() == content


def test_of_a_run_what_has_changed_is_carried_but_no_checkpoints_or_hidden_files(base, store):
    folder = Path(remote.local(base))
    for name in ("a.txt", "b.txt", "samples/1.png", "checkpoints/1/d", ".lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    remote.push_small(folder)
    assert remote.listing(folder).keys() == {"a.txt", "b.txt", "samples/1.png"}
    store.pipe_file(f"{base}/a.txt", b"of another")
    (folder / "b.txt").write_text("newer")
    remote.push_small(folder)
    assert store.cat_file(f"{base}/a.txt") == b"of another"
    assert store.cat_file(f"{base}/b.txt") == b"newer"


def test_lines_of_two_writers_are_joined(base, store):
    path = Path(remote.local(base)) / "evaluation" / "results.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"first\nours\n")
    store.pipe_file(f"{base}/evaluation/results.jsonl", b"first\ntheirs\n")
    remote.push_lines(path)
    assert store.cat_file(f"{base}/evaluation/results.jsonl") == b"first\ntheirs\nours\n"
    assert path.read_bytes() == b"first\ntheirs\nours\n"


def test_paths_elsewhere_are_not_touched(tmp_path):
    (tmp_path / "gs" / "bucket").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "gs" / "bucket", Path("/")):
        assert not remote.is_mirrored(path)
        assert remote.url_of(path) == str(path)
    remote.push(tmp_path)
    remote.push_lines(tmp_path / "missing")
    remote.push_small(tmp_path)
    assert remote.local(tmp_path) == str(tmp_path)


def test_one_file_is_fetched_as_such(base, store):
    store.pipe_file(f"{base}/net.pkl", b"weights")
    assert Path(remote.local(f"{base}/net.pkl")).read_bytes() == b"weights"
    assert not Path(remote.local(f"{base}/other.pkl")).exists()


def test_texts_name_the_url(base):
    folder = remote.local(base)
    assert remote.named(f"Cannot use {folder}/config.json, nor {folder}.") == (
        f"Cannot use {base}/config.json, nor {base}."
    )


@pytest.mark.parametrize("name", ["../../evil", "a/../../evil", "/evil", "a//b"])
def test_objects_whose_names_lead_elsewhere_are_refused(base, monkeypatch, name):
    class Hostile:
        def find(self, prefix, detail):
            return {f"{prefix}/{name}": {"size": 4}, f"{prefix}/config.json": {"size": 2}}

    monkeypatch.setattr(mirror, "_file_system", lambda scheme: Hostile())
    with pytest.raises(UserError, match=r"holds an object named .* remove it"):
        remote.local(base)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://host/run", "gs://BUCKET/PATH or s3://BUCKET/PATH"),
        ("ftp://host/run", "not supported"),
        ("az://container/run", "not supported"),
        ("file:/tmp/run", "not supported"),
        ("gs:/bucket/run", "not supported"),
        ("gs://bucket", "does not name a folder in a bucket"),
        ("gs://bucket/../run", "does not name a folder in a bucket"),
        ("gs://bucket//run", "does not name a folder in a bucket"),
        ("gs://bucket/run*", "does not name a folder in a bucket"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "info", "doctor"])
def test_urls_that_cannot_be_used_are_refused_in_a_sentence(monkeypatch, url, words, mode):
    monkeypatch.setattr(mirror.importlib.util, "find_spec", lambda package: package)
    printed = run(f"--mode={mode}", f"--workdir={url}", status=2)
    assert printed.startswith(f"error: --workdir={url}")
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, scheme, extra):
    monkeypatch.setattr(mirror.importlib.util, "find_spec", lambda package: None)
    printed = run("--mode=info", f"--workdir={scheme}://bucket/run", status=2)
    assert f"pip install 'lora-diffusion-jax[train,{extra}]'" in printed


def test_flags_of_other_paths_take_no_url():
    printed = run("--mode=sample", "--workdir=x", "--out=gs://bucket/out", status=2)
    assert "only paths on this machine" in printed


def test_a_sweep_stays_on_this_machine(base):
    printed = run("--mode=sweep", "--config=digits", f"--workdir={base}", status=2)
    assert "give a folder" in printed


def test_what_is_missing_is_a_sentence_that_names_the_url(base):
    printed = run("--mode=sample", f"--workdir={base}", "--out=x.npz", status=2)
    assert printed.startswith(f"error: {base} is not a run")
    printed = run("--mode=train", f"--workdir={base}", status=2)
    assert printed == f"error: {base} holds no run; start one with --config.\n"


def test_a_missing_bucket_is_a_sentence(gcs):
    url = "gs://nobucket/run"
    folder = Path(remote.local(url))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{url}.*no such bucket.*credentials"):
        remote.push(folder)


def test_the_mirror_goes_with_its_process_and_that_of_a_killed_one_with_the_next(
    base, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = f"""
import time
from lora_diffusion_jax import remote
print(remote.local("{base}"), flush=True)
time.sleep(WAIT)
"""

    def start(wait):
        command = [sys.executable, "-c", code.replace("WAIT", str(wait))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    ended = start(0)
    assert ended.wait() == 0
    assert not list(tmp_path.iterdir())

    killed, alive = start(600), start(600)
    folders = [Path(process.stdout.readline().strip()) for process in (killed, alive)]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    mirrors = [next(p for p in f.parents if p.parent == tmp_path) for f in folders]
    assert all(folder.exists() for folder in mirrors)
    for folder in mirrors:
        os.utime(folder, (time.time() - 3600,) * 2)
    assert start(0).wait() == 0
    assert [folder.exists() for folder in mirrors] == [False, True]
    alive.kill()
    alive.wait()


def test_a_store_that_does_not_answer_is_a_sentence(base, monkeypatch):
    class Silent:
        def find(self, prefix, detail):
            raise TimeoutError("Connection timed out")

    monkeypatch.setattr(mirror, "_file_system", lambda scheme: Silent())
    printed = run("--mode=info", f"--workdir={base}", status=2)
    assert printed.startswith(f"error: Cannot use {base} (TimeoutError: Connection timed out).")
    assert printed.count("\n") == 1


def test_a_slash_at_the_end_changes_nothing(gcs):
    assert remote.check_url(f"gs://{BUCKET}/a/", "--workdir") == f"gs://{BUCKET}/a"
