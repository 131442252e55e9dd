"""Runs in an object store: their mirror on this machine, and the lease that takes the place of a lock."""

from lora_diffusion_jax.remote.lease import Lease
from lora_diffusion_jax.remote.mirror import (
    check_url,
    check_writable,
    close,
    fetch,
    fetch_configs,
    fetch_small,
    is_mirrored,
    is_url,
    listing,
    local,
    named,
    push,
    push_lines,
    push_small,
    remove,
    url_of,
)

__all__ = [
    "Lease",
    "check_url",
    "check_writable",
    "close",
    "fetch",
    "fetch_configs",
    "fetch_small",
    "is_mirrored",
    "is_url",
    "listing",
    "local",
    "named",
    "push",
    "push_lines",
    "push_small",
    "remove",
    "url_of",
]
