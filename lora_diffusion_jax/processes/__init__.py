"""Several processes as one program: joining, agreeing within a time limit, failing together."""

from lora_diffusion_jax.processes.agreement import barrier, check_same, exchange, from_leader
from lora_diffusion_jax.processes.arrays import fetch, place
from lora_diffusion_jax.processes.failing import begin_step, ending_together
from lora_diffusion_jax.processes.joining import check_joined, join
from lora_diffusion_jax.processes.session import SharedError, alone, is_leader

__all__ = [
    "SharedError",
    "alone",
    "barrier",
    "begin_step",
    "check_joined",
    "check_same",
    "ending_together",
    "exchange",
    "fetch",
    "from_leader",
    "is_leader",
    "join",
    "place",
]
