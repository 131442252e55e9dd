"""Object stores for tests: servers that speak the protocols of Google Cloud Storage and S3."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from lora_diffusion_jax.remote import mirror

BUCKET = "bucket"
# Runs a module whose server lets many callers wait: by default it drops the sixth, who tries again later.
RUN = """
import runpy, socketserver, sys
socketserver.TCPServer.request_queue_size = 256
module = sys.argv.pop(1)
if module == "gcp_storage_emulator":
    from tests.remote import whole_uploads
sys.argv[0] = module
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
# Scheme -> the packages that a test needs, the server's command line, and the environment of its users.
SERVERS = {
    "gs": (
        ("gcsfs", "gcp_storage_emulator"),
        "gcp_storage_emulator start --in-memory --host 127.0.0.1 --port {port}",
        {
            "STORAGE_EMULATOR_HOST": "http://127.0.0.1:{port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which speaks gRPC
        },
    ),
    "s3": (
        ("s3fs", "moto", "flask"),
        "moto.server -H 127.0.0.1 -p {port}",
        {
            "AWS_ENDPOINT_URL": "http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    ),
}


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[None]:
    """A store with an empty bucket, which this process and those it starts find in the environment."""
    packages, command, variables = SERVERS[scheme]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", RUN, *command.format(port=port).split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    variables = {name: value.format(port=port) for name, value in variables.items()}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        _wait_for(port)
        _forget_clients(scheme)
        file_system(scheme).mkdir(BUCKET)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        server.kill()
        server.wait()
        _forget_clients(scheme)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return
        except urllib.error.HTTPError:  # it answers
            return
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


def _forget_clients(scheme: str) -> None:
    """Clients are cached, and know the server that there was when they were made."""
    import fsspec

    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    mirror._file_system.cache_clear()


def file_system(scheme: str):
    """A client of the store."""
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)
