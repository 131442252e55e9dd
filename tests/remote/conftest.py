"""The stores that the tests of this folder use."""

import re

import pytest

from lora_diffusion_jax import remote
from tests.remote.servers import BUCKET, file_system, serving


@pytest.fixture(scope="session")
def gcs():
    """The server of gs://bucket."""
    with serving("gs"):
        yield


@pytest.fixture
def base(gcs, request):
    """A URL below which nothing is, and this process without a mirror."""
    remote.close()
    yield f"gs://{BUCKET}/{re.sub('[^a-z0-9_]', '-', request.node.name)}"
    remote.close()


@pytest.fixture
def store(gcs):
    """A client of the store, beside the program's own."""
    return file_system("gs")
