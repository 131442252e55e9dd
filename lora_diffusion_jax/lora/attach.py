"""Attaching adapters to the layers of any linen or nnx module, from outside; linen by method interception."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import flax
import flax.linen as nn
import jax
from flax import nnx, traverse_util

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.lora.adapter import LAYER_TYPES, SumOfAdapters, check_layer
from lora_diffusion_jax.lora.attachment import (
    Attachment,
    check_names,
    hint,
    kind,
    matches,
    no_layer,
)
from lora_diffusion_jax.lora.nnx import adapter_tree, attach_nnx, sown_by_sites
from lora_diffusion_jax.paths import ADAPTER, list_sites

# Attribute of the adapters that are made here: tells them from a base's own submodule named `lora`.
_MARK = "_is_lora_adapter"

Model = TypeVar("Model", bound=nnx.Module)


class _Call:
    """The state of one forward call of an adapted module."""

    def __init__(self, wrapper: "Adapted", conditions: dict[str, Any]) -> None:
        self.wrapper = wrapper
        self.conditions = conditions  # of the attachments that have theirs already, by name
        self.adapters: dict[int, tuple[nn.Module, nn.Module]] = {}
        self.candidates: set[str] = set()
        self.sites: dict[str, set[str]] = {a.name: set() for a in wrapper.attachments}
        self.paths: set[str] = set()

    def intercept(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The interceptor: taps the conditions, and adds the adapters' outputs at the sites."""
        module = context.module
        parts = module.path[len(self.wrapper.path) :]  # Flax's paths begin at the outermost module
        if parts and parts[-1] == ADAPTER and not hasattr(module, _MARK):
            raise UserError(
                f"The base has a submodule '{'/'.join(parts)}', but '{ADAPTER}' is the name of adapters and "
                "their parameters. Give it another name."
            )
        # Left alone: other methods, the base itself, and the layers that adapters are made of.
        if context.method_name != "__call__" or not parts or ADAPTER in parts:
            return next_fun(*args, **kwargs)
        path = "/".join(parts)
        self.paths.add(path)
        tapped = [  # of several matches the first
            a for a in self.wrapper.attachments if a.name not in self.conditions and a.taps(path)
        ]
        if isinstance(module, LAYER_TYPES):  # listed if no site is found
            self.candidates.add(path)
        here = [a for a in self.wrapper.attachments if a not in tapped and matches(a.sites, path)]
        if here:
            check_layer(module, path)
            check_names(path, here)
        y = next_fun(*args, **kwargs)
        for attachment in here:
            self.sites[attachment.name].add(path)
        if here and self.wrapper.enabled:  # only now, so that the patterns are checked all the same
            x = args[0] if args else kwargs["inputs"]  # the name that all LAYER_TYPES give it
            y = y + self._delta(module, path, here, x)
        self.conditions.update({attachment.name: y for attachment in tapped})
        return y

    def _delta(
        self, layer: nn.Module, path: str, here: Sequence[Attachment], x: jax.Array
    ) -> jax.Array:
        """What the adapters of a site add to its output."""
        conditions = {a.name: self._condition_at(path, a) for a in here}
        condition = conditions if here[0].name else conditions[""]
        try:
            return self._adapter(layer, here)(layer, x, condition)
        except flax.errors.NameInUseError:
            raise UserError(
                f"LoRA site '{path}' has an adapter already. Attach to one module, in several calls that "
                "name the adapters."
            ) from None
        except flax.errors.ScopeParamShapeError as error:
            raise UserError(
                f"LoRA site '{path}' got a condition or an input of a different width from that at "
                f"initialisation ({str(error).split('. (http')[0]}). Give arrays of the same width."
            ) from error

    def _adapter(self, layer: nn.Module, here: Sequence[Attachment]) -> nn.Module:
        """The layer's adapter, made once per call; several by their names."""
        if id(layer) not in self.adapters:  # holding on to the layer keeps its id from being reused
            named = here[0].name  # check_names: all or none
            made = SumOfAdapters({a.name: a.adapter for a in here}) if named else here[0].adapter
            adapter = made.clone(parent=layer, name=ADAPTER)
            object.__setattr__(adapter, _MARK, True)  # Flax freezes modules outside of setup
            self.adapters[id(layer)] = (layer, adapter)
        return self.adapters[id(layer)][1]

    def _condition_at(self, path: str, attachment: Attachment) -> Any:
        if attachment.name not in self.conditions:
            raise UserError(
                f"LoRA site '{path}' was reached before a submodule that matches the condition pattern "
                f"{attachment.condition!r}. Submodules so far: {sorted(self.paths)}. Tap a module that "
                "runs earlier, or pass a function of the call's arguments as the condition."
            )
        return self.conditions[attachment.name]

    def check(self) -> None:
        """Raises UserError if a pattern reached no site, listing the layers that could be one."""
        for attachment in self.wrapper.attachments:
            if not self.sites[attachment.name]:
                raise no_layer(attachment.sites, self.candidates)


class Adapted(nn.Module):
    """A module with adapters at its sites; made by `attach`, called like the module itself.

    It shares the module's scope: base parameters keep the paths that they have without LoRA, and the
    adapter of a layer lies below it in the subtree `lora`.

    Attributes:
        module: the base.
        attachments: the adapters, with their sites and conditions.
        enabled: False bypasses the adapters: the base alone, with the same variables.
    """

    module: nn.Module
    attachments: tuple[Attachment, ...]
    enabled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is not None:  # None until init, apply or a parent binds the module
            nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base with the adapters in place."""
        given = {a.name: a.given(args, kwargs) for a in self.attachments if callable(a.condition)}
        call = _Call(self, given)
        with nn.intercept_methods(call.intercept):
            result = self.module(*args, **kwargs)
        call.check()
        return result


@overload
def attach(
    module: nn.Module,
    *,
    sites: str,
    adapter: nn.Module,
    condition: str | Callable[..., Any],
    name: str = "",
) -> Adapted: ...


@overload
def attach(
    module: Model,
    *,
    sites: str,
    adapter: nn.Module,
    condition: str | Callable[..., Any],
    name: str = "",
    inputs: Sequence[Any] | None = None,
    seed: int = 0,
) -> Model: ...


def attach(
    module: Any,
    *,
    sites: str,
    adapter: nn.Module,
    condition: str | Callable[..., Any],
    name: str = "",
    inputs: Sequence[Any] | None = None,
    seed: int = 0,
) -> Any:
    """Returns `module` with a conditioned low-rank adapter at each site (arXiv 2405.03958).

    At initialisation the result computes exactly what `module` does, and its base parameters have
    the paths and values that they have without LoRA. `module` itself is not changed. Attach again to the
    result, with another `name`, for adapters with other sites and another condition.

    A linen module gives a linen module. It works under jit, grad, vmap (of single inputs, too), nn.remat,
    nn.scan and nn.vmap; every copy of nn.vmap sees the whole condition. An nnx module gives a clone whose
    class derives from the module's; its adapters' parameters are `LoRAParam`s. It works under nnx.jit,
    grad, remat, scan and vmap. A condition that is tapped must come from outside scan and remat regions.

    Args:
        module: any linen or nnx module.
        sites: regular expression for the '/'-joined paths, relative to `module`, of the Dense,
            DenseGeneral and Conv layers (in nnx: Linear, LinearGeneral and Conv) to adapt; it must match
            the whole path.
        adapter: `UCLoRA`, `TimeLoRA`, `ClassLoRA`, `SumOfAdapters`, or your own linen module called as
            (layer, x, condition) -> delta.
        condition: regular expression for the path of the submodule whose output is the condition,
            or a function of the call's arguments that returns it, for UC-LoRA [B, E] or [B, tokens, E].
        name: of these adapters; their parameters lie in `lora/<name>`, without a name in `lora`.
        inputs: nnx alone: arguments of a call, from which the condition's width is learned. Without them
            the parameters of UC-LoRA are made by the first call, unless the tapped module is a layer.
        seed: nnx alone: of the adapters' initialisation. Linen's `init` takes a key.

    Raises:
        UserError: arguments of other types, or invalid sizes, patterns or names; at the first call (for
            nnx at once): no layer matches (the error lists the candidates), a matching layer cannot be
            adapted, several adapters at a site have no names, or no condition was tapped.
    """
    if not isinstance(module, nn.Module | nnx.Module):
        raise UserError(
            f"The module that lora.attach got is {kind(module)}; expected an instance of a linen "
            f"module or of an nnx module{hint(module)}."
        )
    attachment = Attachment(name, sites, adapter, condition)
    attachment.check()
    if isinstance(module, nnx.Module):
        return attach_nnx(module, attachment, inputs, seed)
    if inputs is not None or seed != 0:
        raise UserError(
            "lora.attach got inputs or a seed for a linen module; give them to its init instead: "
            "wrapped.init(jax.random.key(seed), *inputs)."
        )
    if isinstance(module, Adapted):
        return module.clone(attachments=attachment.joined(module.attachments))
    return Adapted(module, (attachment,))


def composition_weights(
    wrapped: Any, *args: Any, **kwargs: Any
) -> dict[str, jax.Array | dict[tuple[str, ...], jax.Array]]:
    """Runs a module with adapters and returns site path -> omega [B or 1, m], times the adapter's scale.

    Called as (wrapped, variables, *inputs) for linen, as (wrapped, *inputs) for nnx. A site with several
    adapters (`SumOfAdapters`, or names) has a dictionary (adapter's name,) -> omega. Linen's sites inside
    nn.scan or nn.vmap have a leading axis for their copies.

    Raises:
        UserError: a site recorded no weights.
    """
    sown, sites = (_sown_nnx if isinstance(wrapped, nnx.Module) else _sown)(
        wrapped, *args, **kwargs
    )
    weights: dict = {}
    for path, values in sown.items():
        if path[-1] != "omega" or ADAPTER not in path:
            continue
        # sow collects a tuple: a site that was called several times gives its last weights.
        at = path.index(ADAPTER)
        site, rest = "/".join(path[:at]), path[at + 1 : -1]
        if rest:
            weights.setdefault(site, {})[rest] = values[-1]
        else:
            weights[site] = values[-1]
    if missing := [site for site in sites if site not in weights]:
        raise UserError(
            f"The LoRA site '{missing[0]}' recorded no composition weights. If it lies inside nn.scan or "
            "nn.vmap, give that variable_axes={'params': 0, 'intermediates': 0}; adapters that are switched "
            "off have none."
        )
    return weights


def _sown(wrapped: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> tuple[dict, list[str]]:
    """What a linen module's adapters sow, by path, and its sites."""
    _, state = wrapped.apply(variables, *args, mutable=["intermediates"], **kwargs)
    flat = traverse_util.flatten_dict(state.get("intermediates", {}))
    return flat, list_sites(variables.get("params", {}))


def _sown_nnx(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[dict, list[str]]:
    """What an nnx module's adapters sow, by path, and its sites."""
    flat = {
        (*site.split("/"), ADAPTER, *([name] if name else []), *path): values
        for (site, name), tree in sown_by_sites(model, *args, **kwargs).items()
        for path, values in traverse_util.flatten_dict(tree).items()
    }
    return flat, list_sites(adapter_tree(model))
