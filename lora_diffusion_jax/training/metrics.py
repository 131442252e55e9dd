"""What a training step measures, how it adds up, and the names it is logged under."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Bool, Float, Int

# Every name in metrics.jsonl and TensorBoard (with fnmatch's wildcards). The train/ values are means
# over the steps since the last line, or of the last step where it says so. A value without data in
# the interval (no image in a noise bin) is left out.
VOCABULARY = {
    "train/loss": "mean loss per pixel (weighted as the objective weights it)",
    # Bin i holds i - 5 <= ln sigma < i - 4; 0 and 9 also all below and above.
    "train/loss_sigma_[0-9]": "the same for the images of one noise level",
    "train/loss_q[0-3]": "mean loss per quarter of the timesteps of a discrete process",
    "train/mse": "of the hybrid loss: the squared error of the predicted noise",
    "train/vb": "and the rest, T/1000 times the term of the variational bound, in bits",
    "train/mse_q[0-3]": "the former per quarter of the timesteps",
    "train/vb_q[0-3]": "and the latter",
    "train/grad_norm": "global norm of the gradient of (sum or mean over pixels, mean over batch)",
    "train/lora_grad_norm": "its part in the adapters, if adapters are trained",
    "train/param_norm": "global norm of the trained parameters after the last step",
    "train/update_norm": "global norm of what the step adds to them",
    "train/learning_rate": "rate of the last step",
    "train/nonfinite_grads": "gradient entries replaced since the start of the run",
    "train/skipped_steps": "steps without update since the start of the run (loss not finite)",
    "perf/images_per_sec": "rate of the interval without callbacks",
    "perf/sec_per_step": "likewise",
    "perf/tflops_per_sec": "all devices together, from the FLOP per image that the caller states",
    "perf/input_wait": "share of the interval in which the step waited for its batch",
    "perf/checkpoint_wait": "share of the interval in which checkpoints held up the loop",
    "perf/device_memory_gb": "largest use so far of this process' first device, where it is known",
    "perf/host_memory_gb": "largest use so far of this process",
    "perf/eta_sec": "time left at this rate",
    "samples/*": "what the callback `samples` returns",
    "eval/*": "what the callback `eval` returns",
    "callback/seconds": "duration of a callback",
}

SIGMA_EDGES = tuple(range(-4, 5))  # of ln sigma


@flax.struct.dataclass
class SigmaAverage(metrics.Metric):
    """Mean loss of the images in each bin of noise level; NaN in a bin without images."""

    total: Float[Array, " bins"]
    count: Float[Array, " bins"]

    num_bins: ClassVar[int] = len(SIGMA_EDGES) + 1
    term: ClassVar[str] = "loss"  # which of the losses of each image [B]

    @classmethod
    def bins(cls, outputs: Mapping[str, Array]) -> Int[Array, " B"]:
        """The bin of each image."""
        edges = jnp.asarray(SIGMA_EDGES, jnp.float32)
        return jnp.searchsorted(edges, jnp.log(outputs["sigma"]), side="right")

    @classmethod
    def empty(cls) -> Self:
        return cls(total=jnp.zeros(cls.num_bins), count=jnp.zeros(cls.num_bins))

    @classmethod
    def from_model_output(
        cls, *, image_losses: Mapping[str, Array], mask: Bool[Array, "1"], **outputs: Any
    ) -> Self:
        member = jax.nn.one_hot(cls.bins(outputs), cls.num_bins) * mask  # [B, bins]
        loss = jnp.where(mask, image_losses[cls.term], 0)  # NaN times 0 is NaN
        return cls(total=loss @ member, count=member.sum(axis=0))

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self) -> Float[np.ndarray, " bins"]:
        total, count = np.asarray(self.total), np.asarray(self.count)
        return np.divide(total, count, out=np.full(self.num_bins, np.nan), where=count > 0)


@flax.struct.dataclass
class QuartileAverage(SigmaAverage):
    """Mean loss per quarter of the timesteps of a discrete process; NaN in one without images."""

    num_bins: ClassVar[int] = 4

    @classmethod
    def bins(cls, outputs: Mapping[str, Array]) -> Int[Array, " B"]:
        """The quarter of each image's timestep, 0 for the least noise."""
        return outputs["quartile"]


@flax.struct.dataclass
class MseQuartiles(QuartileAverage):
    """The same of the hybrid loss's squared error."""

    term: ClassVar[str] = "mse"


@flax.struct.dataclass
class BoundQuartiles(QuartileAverage):
    """The same of the hybrid loss's term of the bound."""

    term: ClassVar[str] = "vb"


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Sums over steps; scalars come as [1] beside a mask [1] that is False in skipped steps."""

    loss: metrics.Average.from_output("loss")
    loss_sigma: SigmaAverage
    grad_norm: metrics.Average.from_output("grad_norm")
    lora_grad_norm: metrics.Average.from_output("lora_grad_norm")  # NaN without adapters
    param_norm: metrics.LastValue.from_output("param_norm")
    update_norm: metrics.Average.from_output("update_norm")
    learning_rate: metrics.LastValue.from_output("learning_rate")


# What the runs of a discrete process measure: the loss by quartile besides.
DiscreteMetrics = metrics.Collection.create(**TrainMetrics.__annotations__, loss_q=QuartileAverage)

# And with the hybrid loss its two terms.
HybridMetrics = metrics.Collection.create(
    **DiscreteMetrics.__annotations__,
    mse=metrics.Average.from_output("mse"),
    vb=metrics.Average.from_output("vb"),
    mse_q=MseQuartiles,
    vb_q=BoundQuartiles,
)


def to_scalars(collection: metrics.Collection) -> dict[str, float]:
    """{'train/loss': ...} of metrics on the host; values without data are left out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {name: np.asarray(value) for name, value in collection.compute().items()}
    scalars = {}
    for name, value in values.items():
        prefix = f"train/{name}{'_' if name == 'loss_sigma' else ''}"
        for i, entry in enumerate(np.atleast_1d(value)):
            scalars[f"{prefix}{i if value.ndim else ''}"] = float(entry)
    return {name: value for name, value in scalars.items() if not np.isnan(value)}


def check_names(names: Iterable[str]) -> None:
    """Refuses names outside the vocabulary, so that runs stay comparable.

    Raises:
        ValueError: naming them.
    """
    unknown = [
        name for name in names if not any(fnmatch.fnmatchcase(name, known) for known in VOCABULARY)
    ]
    if unknown:
        raise ValueError(
            f"Metric names {unknown} are not in the vocabulary; see {__name__}, or use eval/... "
            "or samples/... in callbacks."
        )
