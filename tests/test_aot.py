"""What benchmarks/aot.py reads from compiled programs, and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot_hlo, aot_report

ROOT = Path(__file__).resolve().parents[1]

# On a mesh of 4 x 2 devices, with float32 [8, 16] on each: 512 bytes.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=auto)

def local(x):
    def body(carry, _):
        return jax.lax.ppermute(carry, "data", [(i, (i + 1) % 4) for i in range(4)]) * 2, None
    x, _ = jax.lax.scan(body, x, length=3)
    whole = jax.lax.all_gather(x, "fsdp", tiled=True)
    total = jax.lax.psum(jnp.sin(x), ("data", "fsdp"))
    part = jax.lax.psum_scatter(x, "data", tiled=True)
    return whole.sum() + total.sum() + part.sum()[None]

call = jax.shard_map(local, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")))
compiled = jax.jit(call).lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile()
print(compiled.as_text())
"""


@pytest.fixture(scope="module")
def module() -> aot_hlo.Module:
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    return aot_hlo.Module(done.stdout)


def test_collectives_of_a_compiled_program(module):
    """Kinds, counts with the loop's rounds, whole sizes, and the ring's bytes for each group."""
    block = 8 * 16 * 4
    assert module.collectives() == {
        "collective-permute": {"count": 3, "bytes": 3 * block, "wire_bytes": 3 * block},
        "all-gather": {"count": 1, "bytes": 2 * block, "wire_bytes": block},
        "all-reduce": {"count": 1, "bytes": block, "wire_bytes": 2 * block * 7 // 8},
        "reduce-scatter": {"count": 1, "bytes": block, "wire_bytes": block * 3 // 4},
    }
    assert module.loop_trips() == 3


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add", 8),
        ("replica_groups=mesh['a'=16], to_apply=%add", 16),
    ],
)
def test_group_size_in_every_spelling(attributes, size):
    assert aot_hlo.group_size(attributes) == size


TPU = """HloModule tpu

%slicing (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %s = f32[2,128]{1,0:S(1)} slice(%p), slice={[0:2], [0:128]}
}

%all-reduce-scatter.1 (q: bf16[8,128]) -> bf16[4,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %r = bf16[8,128]{1,0} all-reduce(%q), replica_groups={{0,1}}, to_apply=%add
  ROOT %d = bf16[4,128]{1,0} dynamic-slice(%r), dynamic_slice_sizes={4,128}
}

%gathering (t: s32[2], u: f32[8,128]) -> f32[2,128] {
  %t = s32[2]{0} parameter(0)
  %u = f32[8,128]{1,0} parameter(1)
  ROOT %g = f32[2,128]{1,0:S(1)} gather(%u, %t), offset_dims={1}
}

ENTRY %main (a: f32[8,128], b: bf16[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%slicing
  %e = f32[2,128]{1,0:S(1)} async-done(%c)
  %f = bf16[4,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %h = s32[2]{0:S(1)} constant({0, 1})
  %i = f32[2,128]{1,0:S(1)} fusion(%h, %a), kind=kCustom, calls=%gathering
  ROOT %add = f32[8,128]{1,0:T(8,128)} add(%a, %a)
}
"""


def test_memory_traffic_and_the_ways_of_tpu():
    """On-chip arrays are free, slices and gathers read a part, a fused reduction and slice is a scatter."""
    module = aot_hlo.Module(TPU)
    sliced, fused, added = 2 * 128 * 4, (8 + 4) * 128 * 2, 3 * 8 * 128 * 4
    assert module.memory_traffic() == 2 * sliced + fused + added
    size = 8 * 128 * 2
    scatter = {"count": 1, "bytes": size, "wire_bytes": size // 2}
    assert module.collectives() == {"reduce-scatter": scatter}


KERNELS = """HloModule kernels

ENTRY %main (q: bf16[2,3,64,8]) -> bf16[2,3,64,8] {
  %q = bf16[2,3,64,8]{3,2,1,0} parameter(0)
  %a = (bf16[2,3,64,8]{3,2,1,0}, f32[2,3,64,128]{3,2,1,0:S(1)}) custom-call(%q, %q, %q), PALLAS
  %m = f32[2,3,64,128]{3,2,1,0:S(1)} get-tuple-element(%a), index=1
  %b = (bf16[2,3,64,8]{3,2,1,0}, bf16[2,3,64,8]{3,2,1,0}) custom-call(%q, %q, %q, %m), PALLAS
  %o = bf16[2,3,64,8]{3,2,1,0} custom-call(%q), custom_call_target="Sharding"
  ROOT %c = bf16[2,3,64,8]{3,2,1,0} custom-call(%q, %q, %q, %m), PALLAS
}
""".replace("PALLAS", 'custom_call_target="tpu_custom_call"')


def test_kernels_of_attention():
    """XLA counts neither their operations nor their memory; other custom calls move nothing."""
    module = aot_hlo.Module(KERNELS)
    product, array = 2 * 2 * 3 * 64 * 64 * 8, 2 * 3 * 64 * 8 * 2
    assert module.kernel_flops() == (2 + 4 + 3) * product
    assert module.memory_traffic() == (4 + 5 + 4) * array


def test_memory_use():
    text = """BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 100, parameter 1, shape |f32[25]| at ShapeIndex {}:
allocation 2: size 40, parameter 0, shape |f32[10]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 8, output shape is |(f32[10])|, maybe-live-out:
allocation 4: size 4, constant:
allocation 5: size 7000, color 1, preallocated-temp:
allocation 6: size 1000, preallocated-temp:
"""
    use = aot_hlo.memory_use(text)
    assert use == {"arguments": 140, "temporaries": 1000, "peak": 1152}


def test_roofline_and_mfu(monkeypatch):
    monkeypatch.setitem(aot_report.CHIPS, "v0", aot_report.Chip(100.0, 10.0, 2.0))
    used = aot_report.Chip(compute=400.0, memory=50.0, network=6.0)
    found = aot_report.bound("v0:2x1", used, chips=2, images=10, model_flops=80.0)
    seconds = {"compute": 4.0, "memory": 5.0, "network": 3.0}
    assert found["roofline"] == {"seconds": seconds, "bound": "memory"}
    # 10 images in 5 s, 80 FLOP each, on two chips of 100 FLOP/s: 160 of 200.
    assert found["predicted"] == {"images_per_sec": 2.0, "mfu": 0.8}


LINES = (ROOT / "docs" / "aot.jsonl").read_text().splitlines()


def test_table_of_the_committed_measurements():
    table = aot_report.table(ROOT / "docs" / "aot.jsonl")
    assert table in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("line", LINES)
def test_bounds_of_the_committed_measurements(line):
    """They follow from the chip's rates and what was counted in the program."""
    row = json.loads(line)
    sent = sum(kind["wire_bytes"] for kind in row["collectives"].values())
    used = aot_report.Chip(row["flop"]["xla_per_device"], row["hbm_traffic"], sent)
    needed = row["flop"]["analytic_per_image"]
    found = aot_report.bound(row["topology"], used, row["chips"], row["batch"], needed)
    assert found["roofline"] == row["roofline"]
    assert found["predicted"] == pytest.approx(row["predicted"])
