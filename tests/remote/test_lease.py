import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_diffusion_jax import files, remote
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.remote import lease, mirror
from lora_diffusion_jax.remote.lease import Lease
from tests.remote.servers import BUCKET, file_system, serving

TAKEN = "Another run is using it ({holder})."


@pytest.fixture
def folder(base, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    return Path(remote.local(base))


@pytest.fixture
def elsewhere(monkeypatch):
    """Each lease is of another machine: whether its process lives cannot be seen."""
    others = [{"boot": k, "namespace": "", "pid": 1, "started": ""} for k in range(1000)]
    monkeypatch.setattr(lease, "this_process", others.pop)


def expire(held):
    """Has a lease expire, as if its process had stopped."""
    held._ended.set()
    held._thread.join()
    held._write(held.number, until=time.time() - 1)


def test_a_second_is_told_who_holds_it_and_until_when(folder):
    with Lease(folder, TAKEN, "process 7 on host"):
        with pytest.raises(files.TakenError) as caught:
            Lease(folder, TAKEN, "me")
        assert re.fullmatch(
            r"Another run is using it \(process 7 on host; its lease lasts until \d\d:\d\d:\d\d\)\.",
            str(caught.value),
        )
    with Lease(folder, TAKEN, "me") as second:  # it was given back
        second.check()


def test_it_is_renewed_while_its_process_lives(folder, elsewhere):
    with Lease(folder, TAKEN, "first", seconds=1.0) as first:
        time.sleep(2.5)
        with pytest.raises(files.TakenError):
            Lease(folder, TAKEN, "second")
        first.check()


def test_an_expired_one_is_taken_over_and_its_holder_writes_no_more(folder, elsewhere, store):
    first = Lease(folder, TAKEN, "first")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    remote.push(folder)
    expire(first)
    with Lease(folder, TAKEN, "second"):
        first.renewed -= 1000  # the first one wakes up
        mirror.set_fence(folder, first.check)
        for write in (remote.push, remote.push_small, lambda f: remote.remove(f, ["config.json"])):
            (folder / "config.json").write_text("changed")
            with pytest.raises(UserError, match="was taken over by second"):
                write(folder)
    assert store.cat_file(f"{remote.url_of(folder)}/config.json") == b"{}"


def test_after_a_pause_in_which_nobody_came_it_is_renewed(folder, elsewhere):
    held = Lease(folder, TAKEN, "first")
    expire(held)
    held.renewed -= 1000
    held.check()
    with pytest.raises(files.TakenError):
        Lease(folder, TAKEN, "second")


def test_that_of_an_ended_process_of_this_machine_is_free_at_once(folder):
    code = f"""
from pathlib import Path
from lora_diffusion_jax import remote
from lora_diffusion_jax.remote import lease
lease.SETTLE = 0.1
remote.Lease(Path(remote.local("{remote.url_of(folder)}")), "", "killed")
print("held", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(files.TakenError, match="killed"):
        Lease(folder, TAKEN, "second")
    process.kill()
    process.wait()
    Lease(folder, TAKEN, "second").release()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("before", [False, True])
def test_of_several_that_start_at_once_one_wins(scheme, before, gcs, monkeypatch, elsewhere):
    """With exclusive writing (S3's server has it) as without (this server of GCS does not)."""
    monkeypatch.setattr(lease, "SETTLE", 0.5)
    remote.close()
    server = serving(scheme) if scheme != "gs" else None
    with server or threading.Lock():
        folder = Path(remote.local(f"{scheme}://{BUCKET}/race-{before}"))
        if before:
            expire(Lease(folder, TAKEN, "earlier"))
        barrier, won, lost = threading.Barrier(4), [], []

        def begin(index):
            barrier.wait()
            try:
                won.append(Lease(folder, TAKEN, f"starter {index}"))
            except files.TakenError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=begin, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert len(lost) == 3
        won[0].check()
        won[0].release()
        remote.close()


def test_s3_grants_a_number_once(monkeypatch):
    with serving("s3"):
        system = file_system("s3")
        system.pipe_file(f"{BUCKET}/x", b"1", mode="create")
        with pytest.raises(FileExistsError):
            system.pipe_file(f"{BUCKET}/x", b"2", mode="create")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"until": "soon"}', b'{"until": NaN}', b'{"until": 1e300}']
)
def test_a_damaged_one_is_told_and_not_taken_over(folder, store, data):
    store.pipe_file(f"{remote.url_of(folder)}/.lease/000004", data)
    with pytest.raises(UserError, match=r"\.lease/000004 is damaged.*Remove it"):
        Lease(folder, TAKEN, "me")


def test_only_the_last_number_stays(folder):
    for _ in range(3):
        Lease(folder, TAKEN, "me").release()
    assert list(remote.listing(folder)) == [".lease/000003"]
    found = json.loads(mirror._open(folder)[0].cat_file(f"{remote.url_of(folder)}/.lease/000003"))
    assert found["until"] == 0
