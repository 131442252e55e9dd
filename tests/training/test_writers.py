import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.writers import (
    Progress,
    Writers,
    duration,
    read_metrics,
)


def read_events(directory):
    """TensorBoard's record format: length, its checksum, data, its checksum."""
    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_lines_and_events_hold_the_same_numbers(tmp_path):
    picture = np.full((4, 6, 3), 200, np.uint8)
    with Writers(tmp_path, 16, 0) as writers:
        writers.write(5, {"train/loss": np.float32(0.5), "perf/eta_sec": 3})
        writers.write(5, {"samples/grid": picture, "eval/fd": float("inf")}, callback="samples")
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["images"], first["train/loss"]) == (5, 80, 0.5)
    assert second["callback"] == "samples"
    assert second["eval/fd"] is None  # JSON has no infinity
    assert "samples/grid" not in second
    values = [(e.step, v.tag, v) for e in read_events(tmp_path) for v in e.summary.value]
    assert [v[:2] for v in values] == [
        (80, "train/loss"),
        (80, "perf/eta_sec"),
        (80, "samples/grid"),
        (80, "eval/fd"),
    ]
    assert values[0][2].simple_value == 0.5
    assert (values[2][2].image.height, values[2][2].image.width) == (4, 6)


def test_reopening_drops_what_came_after_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 10, "x": 1.5}, {"step": 20, "callback": "eval"}, {"step": 30}]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(whole + '{"step": 40, "trai')
    with Writers(tmp_path, 16, 20) as writers:
        assert writers.done == {"eval"}
        writers.write(30, {"train/loss": 2.0})
    kept = read_metrics(tmp_path)
    assert kept[:2] == lines[:2]
    assert [line["step"] for line in kept] == [10, 20, 30]
    with Writers(tmp_path, 16, 30) as writers:
        assert writers.done == set()


def test_a_damaged_line_is_kept_aside_and_the_others_stay(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with Writers(tmp_path, 16, 0) as writers:
        for step in (1, 2, 3):
            writers.write(step, {"train/loss": step / 2})
    data = bytearray(path.read_bytes())
    data[data.index(b"loss", 100) + 1] ^= 4
    path.write_bytes(data)
    damaged = data.split(b"\n")[1]
    with Writers(tmp_path, 16, 3) as writers:
        writers.write(4, {"train/loss": 2.0})
    assert "moved 1 damaged lines" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged + b"\n"
    Writers(tmp_path, 16, 4).lines.close()
    assert capsys.readouterr().out == ""


def test_a_link_in_place_of_the_metrics_is_refused(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="metrics.jsonl is a link"):
        Writers(tmp_path / "run", 16, 0)
    assert (tmp_path / "outside").read_text() == "precious"


def test_an_unknown_name_is_refused_before_anything_is_written(tmp_path):
    with Writers(tmp_path, 16, 0) as writers, pytest.raises(ValueError, match="loss"):
        writers.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == []


def test_a_full_disk_is_a_plain_error(tmp_path):
    with Writers(tmp_path, 16, 0) as writers, Path("/dev/full").open("ab", buffering=0) as full:
        writers.lines.close()
        writers.lines = full
        with pytest.raises(UserError, match="no space left on device"):
            writers.write(1, {"train/loss": 1.0})


def test_progress_is_printed_now_and_then_without_a_terminal(capsys):
    progress = Progress(1000, done=100)
    progress.update(200, 0.5)
    assert capsys.readouterr().out == ""
    progress.printed -= 60
    progress.started -= 10
    progress.update(300, 0.25)
    out = capsys.readouterr().out
    assert out.startswith("300 of 1,000 img | loss 0.2500 | ")
    # 100 images in ten seconds since the first step; what came before it does not count.
    rate = float(re.search(r"([\d.]+) img/s \| 0:01:1\d left", out)[1])
    assert rate == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (62.4, "0:01:02"), (2 * 86400 + 5, "2 days, 0:00:05"), (1e300, "11574074 d")],
)
def test_durations(seconds, text):
    assert duration(seconds).startswith(text)


FULL = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from lora_diffusion_jax.training.writers import Writers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
writers = Writers(Path(sys.argv[1]), 1, 0)
picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
for step in range(1, 40):
    writers.write(step, {"samples/grid": picture})
"""


def test_a_full_disk_stops_the_run_rather_than_hang_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "UserError: Cannot use" in done.stderr
    assert "free space" in done.stderr
