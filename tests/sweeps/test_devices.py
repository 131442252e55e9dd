"""Which devices each of several runs is shown; no device is touched."""

import pytest

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.sweeps.devices import slots, visible


@pytest.fixture
def dev(tmp_path):
    """Makes a folder like /dev."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def test_one_run_per_gpu(dev):
    folder = dev("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null")
    assert visible({}, folder) == ("gpu", ["0", "1"])
    found = slots(None, {}, folder)
    assert found == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_gpus_that_the_environment_names_are_the_ones_to_share_out(dev):
    folder = dev("nvidia0", "nvidia1", "nvidia2", "nvidia3")
    environment = {"CUDA_VISIBLE_DEVICES": "3,1,GPU-5"}
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots(None, environment, folder)] == [
        "3",
        "1",
        "GPU-5",
    ]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots(2, environment, folder)] == ["3,GPU-5", "1"]
    assert slots(1, environment, folder) == [{}]  # it sees all of them anyway
    assert visible({"CUDA_VISIBLE_DEVICES": ""}, folder) == ("cpu", [])
    assert visible({"JAX_PLATFORMS": "cpu"}, folder) == ("cpu", [])


def test_more_runs_than_gpus_share_their_memory(dev):
    folder = dev("nvidia0", "nvidia1")
    found = slots(4, {}, folder)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in found] == ["0", "1", "0", "1"]
    shares = [float(s["XLA_PYTHON_CLIENT_MEM_FRACTION"]) for s in found]
    assert shares == [0.45] * 4
    own = slots(4, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, folder)
    assert all(set(s) == {"CUDA_VISIBLE_DEVICES"} for s in own)


GOOGLE, NVIDIA, INTEL = "0x1ae0", "0x10de", "0x8086"
CHIP, NETWORK, DISK, DISPLAY = "0xff0000", "0x020000", "0x010802", "0x030200"


@pytest.fixture
def pci(tmp_path):
    """Makes a folder like /sys/bus/pci/devices, of (vendor, class) of each device."""

    def make(*devices):
        for number, (vendor, kind) in enumerate(devices):
            folder = tmp_path / "pci" / f"0000:00:{number:02x}.0"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "class").write_text(f"{kind}\n")
        return tmp_path / "pci"

    return make


@pytest.mark.parametrize("names", [("accel0", "accel1"), ("vfio/0", "vfio/1", "vfio/vfio")])
def test_a_chip_for_each_run_on_a_tpu_machine(dev, pci, names):
    folder, bus = dev(*names), pci((GOOGLE, CHIP), (GOOGLE, NETWORK), (INTEL, DISK), (GOOGLE, CHIP))
    found = slots(None, {}, folder, bus)
    assert [s["TPU_VISIBLE_CHIPS"] for s in found] == ["0", "1"]
    assert all(s["TPU_PROCESS_BOUNDS"] == "1,1,1" for s in found)
    with pytest.raises(UserError, match="2 TPU chips, which processes cannot share"):
        slots(3, {}, folder, bus)


@pytest.mark.parametrize(
    "devices",
    [
        [],  # a container that hides the bus
        [(NVIDIA, DISPLAY), (NVIDIA, DISPLAY)],  # GPUs for virtual machines
        [(INTEL, NETWORK), (INTEL, DISK)],  # DPDK, SPDK
        [(GOOGLE, NETWORK), (GOOGLE, DISK)],  # a virtual machine of Google's
    ],
)
def test_what_is_handed_on_by_vfio_is_a_chip_only_on_a_tpu_machine(dev, pci, devices):
    assert visible({}, dev("vfio/7", "vfio/12", "vfio/vfio"), pci(*devices)) == ("cpu", [])


def test_without_devices_runs_share_the_processor(dev):
    assert slots(None, {}, dev()) == [{}]
    assert slots(3, {}, dev()) == [{}, {}, {}]
    with pytest.raises(UserError, match="--jobs is 0"):
        slots(0, {}, dev())
