import itertools
import time

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from lora_diffusion_jax.data.pipeline import READ_AHEAD, Batches, epoch_order
from lora_diffusion_jax.data.sources import open_source
from lora_diffusion_jax.errors import UserError

N = 23


class Numbered:
    """A source by the protocol alone; image i is filled with i and has class i % 3."""

    num_classes = 3
    class_names = ("a", "b", "c")

    def __init__(self, size=N, image_shape=(2, 4, 1)):
        self.size = size
        self.image_shape = image_shape
        self.reads = 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads += 1
        return {
            "image": np.full(self.image_shape, index % 256, np.uint8),
            "label": np.int32(index % 3),
        }


@pytest.fixture
def folder(tmp_path):
    for i in range(N):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def take(iterator, count):
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def test_order_is_a_new_permutation_in_every_epoch():
    orders = [epoch_order(5, epoch, 1000) for epoch in range(50)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
        assert order.dtype == np.int32
    assert len({order.tobytes() for order in orders}) == 50
    # another seed does not pass through the same epochs
    other = {epoch_order(6, epoch, 1000).tobytes() for epoch in range(50)}
    assert not other & {order.tobytes() for order in orders}


def test_order_is_random():
    orders = np.stack([epoch_order(seed, epoch, 500) for seed in range(20) for epoch in range(20)])
    # 400 permutations: each place holds each fifth of the images 80 times; chi-squared over
    # 500 places with 4 degrees each, at a level that a right generator fails once in 10,000 seeds
    counts = np.stack([(orders // 100 == fifth).sum(0) for fifth in range(5)])
    chi = ((counts - 80) ** 2 / 80).sum()
    assert stats.chi2.sf(chi, 499 * 4) > 1e-4
    # neighbours, and the same place in following epochs, are uncorrelated (5 standard errors)
    for a, b in ((orders[:, :-1], orders[:, 1:]), (orders[:-1], orders[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_order_is_fixed_for_good():
    # Any change of these would give every resumed run another order.
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(2**64 - 1, 3, 8).tolist() == [3, 2, 0, 1, 6, 5, 4, 7]


@pytest.mark.parametrize("batch_size", [1, 4, N, 50])
def test_batches_run_through_epochs_and_drop_nothing(batch_size):
    batches = Batches(Numbered(), batch_size, seed=1)
    steps = -(-3 * N // batch_size)
    indices = np.concatenate([batches.indices(k) for k in range(steps)])[: 3 * N]
    assert indices.dtype == np.int32
    for epoch in range(3):
        np.testing.assert_array_equal(
            indices[epoch * N : (epoch + 1) * N], epoch_order(1, epoch, N)
        )


@pytest.mark.parametrize("memory_limit", [0, 2**30])
@pytest.mark.parametrize("start", [0, 9])
def test_iterating_gives_the_batches_of_each_step(memory_limit, start):
    batches = Batches(Numbered(), 4, seed=1, memory_limit=memory_limit)
    assert (batches.images is None) == (memory_limit == 0)
    for k, batch in enumerate(take(batches.iterate(start), 15), start):
        np.testing.assert_array_equal(batch["image"][:, 1, 3, 0], batches.indices(k))
        np.testing.assert_array_equal(batch["label"], batches.indices(k) % 3)
        np.testing.assert_array_equal(batch["image"], batches[k]["image"])
        assert batch["image"].shape == (4, 2, 4, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32


def test_streamed_folder_equals_folder_in_memory(folder):
    source = open_source(path=str(folder))
    memory, stream = Batches(source, 5, 3), Batches(source, 5, 3, memory_limit=N * 16 - 1)
    assert memory.images is not None
    assert stream.images is None
    for a, b in zip(take(memory.iterate(), 12), take(stream.iterate(), 12), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4, 9, 10], [11], range(12)])
def test_a_process_gets_its_rows_of_each_batch(rows):
    whole, mine = Batches(Numbered(), 12, seed=2), Batches(Numbered(), 12, seed=2, rows=rows)
    for k in (0, 1, 5, 1000):  # across the ends of epochs, too
        np.testing.assert_array_equal(mine[k]["image"], whole[k]["image"][list(rows)])


def test_streaming_process_reads_only_its_part():
    source = Numbered()
    batches = Batches(source, 12, 2, rows=[3, 4, 5], memory_limit=0)
    batches[0]
    assert source.reads == 3


def test_small_data_set_is_decoded_once_in_order(folder):
    batches = Batches(open_source(path=str(folder)), 4, 0)
    np.testing.assert_array_equal(batches.images[:, 0, 0, 0], np.arange(N))
    assert batches.images.shape == (N, 4, 4, 1)
    np.testing.assert_array_equal(batches.labels, np.zeros(N))


def test_large_images_are_decoded_in_threads_and_in_order():
    source = Numbered(600, (96, 96, 3))  # three chunks
    batches = Batches(source, 4, 0)
    np.testing.assert_array_equal(batches.images[:, 5, 0, 2], np.arange(600) % 256)
    np.testing.assert_array_equal(batches.labels, np.arange(600) % 3)


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_broken_image_is_named_while_training(folder, memory_limit):
    source = open_source(path=str(folder))
    data = (folder / "07.png").read_bytes()
    (folder / "07.png").write_bytes(data[: len(data) - 20])
    with pytest.raises(UserError, match=r"07\.png cannot be read"):
        take(Batches(source, 4, 0, memory_limit=memory_limit).iterate(), 7)


def test_waiting_is_measured():
    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    batches = Batches(Slow(), 2, 0, memory_limit=0)
    assert batches.wait_seconds == 0
    take(batches.iterate(), 5)
    assert 0.1 < batches.wait_seconds < 2  # ten sleeps of 0.02 s, less what is read ahead


def test_reading_ahead_hides_the_reading():
    batches = Batches(Numbered(), 2, 0, memory_limit=0)
    iterator = batches.iterate()
    next(iterator)
    time.sleep(0.2)
    reads = batches.source.reads
    assert reads >= 2 * READ_AHEAD  # the batch taken and those kept ready
    iterator.close()
    time.sleep(0.1)
    assert batches.source.reads <= reads + 2 * READ_AHEAD  # and it stops


def test_worker_processes_give_the_same_batches(folder):
    batches = Batches(open_source(path=str(folder)), 4, 3, memory_limit=0, num_workers=2)
    for k, batch in enumerate(take(batches.iterate(2), 10), 2):
        np.testing.assert_array_equal(batch["image"], batches[k]["image"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, r"seed -1 .* expected 0 to"),
        ({"seed": 2**64}, "seed"),
        ({"source": Numbered(0)}, "holds 0 images"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        Batches(**{"source": Numbered(), "batch_size": 4, "seed": 0, **arguments})
