"""What several processes need beside jax.distributed: a clear start, agreement, a common end."""

from lora_diffusion_jax.processes.agreement import (
    SharedError,
    alone,
    barrier,
    check_same,
    exchange,
    from_leader,
    is_leader,
    session,
)
from lora_diffusion_jax.processes.arrays import call, fetch, place, place_rows
from lora_diffusion_jax.processes.ending import ending_together, raised_by_all
from lora_diffusion_jax.processes.interrupts import SIGNALS, Interrupted, Interrupts, pause_point
from lora_diffusion_jax.processes.joining import check_joined, join

__all__ = [
    "SIGNALS",
    "Interrupted",
    "Interrupts",
    "SharedError",
    "alone",
    "barrier",
    "call",
    "check_joined",
    "check_same",
    "ending_together",
    "exchange",
    "fetch",
    "from_leader",
    "is_leader",
    "join",
    "pause_point",
    "place",
    "place_rows",
    "raised_by_all",
    "session",
]
