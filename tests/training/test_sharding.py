import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.training.sharding import (
    check_batch_size,
    leaf_spec,
    local_rows,
    make_mesh,
    put_replicated,
)
from tests.small import run_on_eight


class FakeMesh:
    """The sizes of a mesh that this machine does not have."""

    def __init__(self, data, fsdp):
        self.shape = {"data": data, "fsdp": fsdp}
        self.size = data * fsdp


def test_a_mesh_of_all_devices():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1}


@pytest.mark.parametrize("sizes", [(3, 1), (-1, 2), (0, 1), (1, 0), (-2, 1), (1, 2)])
def test_a_mesh_that_does_not_fit_is_an_error(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*sizes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 256, 512), P(None, None, None, "fsdp")),
        ((1024, 256), P("fsdp")),
        ((256, 256), P(None, "fsdp")),
        ((1023, 256), P(None, "fsdp")),  # the largest does not divide
        ((255, 1023), P()),  # none does
        ((256,), P()),  # too small to be worth it
        ((), P()),
    ],
)
def test_large_parameters_are_split_along_their_largest_axis(shape, spec):
    assert leaf_spec(shape, FakeMesh(2, 4)) == spec
    assert leaf_spec(shape, FakeMesh(8, 1)) == P()


def test_batches_that_do_not_divide_are_errors_with_numbers():
    mesh = FakeMesh(4, 2)
    check_batch_size(64, mesh, microbatch=16)
    with pytest.raises(UserError, match="batch_size 60 .* 8 devices .*; take 56 or 64"):
        check_batch_size(60, mesh)
    with pytest.raises(UserError, match=r"microbatch 24 .*: \[8, 16, 32, 64\]"):
        check_batch_size(64, mesh, microbatch=24)
    with pytest.raises(UserError, match="take 8 or 16"):
        check_batch_size(0, mesh)


def test_replicated_arrays_are_whole_on_every_device():
    mesh = make_mesh()
    whole = put_replicated({"a": np.arange(5)}, mesh)["a"]
    assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(whole, np.arange(5))
    np.testing.assert_array_equal(local_rows(16, mesh), np.arange(16))


MESHES = """
import json, sys
import jax, numpy as np
from lora_diffusion_jax.training import sharding
from tests.training import stand_in

sharding.FSDP_MIN_SIZE = 512  # the stand-in's layers are small
devices, out, states = jax.devices(), {}, {}

def run(name, devices, data, fsdp, total=50, **options):
    mesh = sharding.make_mesh(data, fsdp, devices)
    options = stand_in.make_run(f"{sys.argv[1]}/{name}", mesh=mesh, total=total, **options)
    states[name] = stand_in.run(**options).state
    losses = [line["train/loss"] for line in stand_in.train_lines(options["workdir"])]
    kernel = states[name].ema["mid"]["kernel"]
    out[name] = {
        "losses": losses,
        "share": kernel.addressable_shards[0].data.size / kernel.size,
        "moments": str(states[name].opt_state[0].mu["mid"]["kernel"].sharding.spec),
    }

every = {"cadence": {"log_every": 16}}
parts = {**every, "step_options": {"microbatch": 8}}
run("1x1", devices[:1], 1, 1, **every)
run("8x1", devices, 8, 1, **every)
run("4x2", devices, 4, 2, **parts)
run("1x8", devices, 1, 8, **every)
run("moved", devices, 2, 4, total=25, **parts)
run("moved", devices[:1], 1, 1, **every)
for name in ("8x1", "4x2", "1x8", "moved"):
    gaps = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
        states["1x1"].params, states[name].params,
    )
    out[name]["gap"] = max(jax.tree.leaves(gaps))
print(json.dumps(out))
"""


def test_eight_devices_train_like_one(tmp_path):
    """Data parallel; fsdp with accumulation; and that moved to one device in the middle."""
    out = json.loads(run_on_eight("-c", MESHES, tmp_path).splitlines()[-1])
    one = out.pop("1x1")
    assert len(one["losses"]) == 50
    for name, run in out.items():
        # Sums in another order differ by float32's rounding; Adam passes on what tiny gradients
        # make of it, at a rate of 2e-3 a step.
        np.testing.assert_allclose(run["losses"], one["losses"], rtol=1e-5, err_msg=name)
        assert run["gap"] < 1e-4, name
    assert [out[name]["share"] for name in ("8x1", "4x2", "1x8")] == [1, 1 / 2, 1 / 8]
    assert out["4x2"]["moments"] == str(P(None, "fsdp"))
    assert out["moved"]["share"] == 1
