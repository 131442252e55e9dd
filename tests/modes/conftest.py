"""A small finished run, shared by the tests of the command line."""

import pytest

from tests.modes.running import train


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, data_dir):
    """A run of 6 steps."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(path, data_dir, 96)
    return path
