"""The sizes that array_record files claim are those of the records that its own writer was given."""

import itertools

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lora_diffusion_jax.data.chunks import unpacked_sizes


def written(path, records, options):
    writer = ArrayRecordWriter(str(path), f"group_size:1{options}")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize("options", ["", ",uncompressed", ",pad_to_block_boundary:true"])
@pytest.mark.parametrize(
    ("most", "count"), [(2, 9000), (300, 900), (5000, 300), (66_000, 40), (400_000, 10)]
)
def test_sizes_are_those_of_the_records(tmp_path, options, most, count):
    """Records and their headers begin and end at all places of the blocks."""
    rng = np.random.default_rng(most)
    sizes = rng.integers(1, most, count).tolist()
    path = written(tmp_path / "x", [rng.bytes(size) for size in sizes], options)
    found = list(unpacked_sizes(path))
    records = [size for size in found[1:] if size]  # a signature comes first; padding has nothing
    assert records[: len(sizes)] == sizes
    assert len(records) <= len(sizes) + 2  # the positions of the records


def test_a_record_that_packs_well_is_told_by_its_true_size(tmp_path):
    path = written(tmp_path / "x", [bytes(100), bytes(8 << 20), bytes(100)], "")
    assert path.stat().st_size < 200_000
    assert max(unpacked_sizes(path)) == 8 << 20


def test_other_files_end_or_go_on_without_an_error(tmp_path):
    """What array_record itself says about them."""
    whole = written(tmp_path / "x", [bytes(3000)] * 20, "").read_bytes()
    rng = np.random.default_rng(0)
    for k in range(200):
        data = bytearray(whole[: rng.integers(len(whole))] if k % 2 else whole)
        for _ in range(k % 4):
            data[rng.integers(min(len(data), 4000))] = rng.integers(256)
        (tmp_path / "y").write_bytes(data)
        list(itertools.islice(unpacked_sizes(tmp_path / "y"), 10_000))
