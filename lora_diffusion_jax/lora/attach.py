"""Attaching adapters to the layers of any linen module, from outside, by method interception."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
from flax import traverse_util

from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.lora.adapter import LAYER_TYPES, check_layer
from lora_diffusion_jax.paths import ADAPTER, list_sites

# Attribute of the adapters that are made here: tells them from a base's own submodule named `lora`.
_MARK = "_is_lora_adapter"


class _Call:
    """The state of one forward call of an adapted module."""

    def __init__(self, wrapper: "Adapted", condition: Any) -> None:
        self.wrapper = wrapper
        self.condition = condition
        self.tapped = condition is not None
        self.adapters: dict[int, tuple[nn.Module, nn.Module]] = {}
        self.candidates: set[str] = set()
        self.sites: set[str] = set()
        self.paths: set[str] = set()

    def intercept(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        """The interceptor: taps the condition, and adds the adapter's output at the sites."""
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
        if not self.tapped and self._taps(path):  # of several matches the first
            self.condition = next_fun(*args, **kwargs)
            self.tapped = True
            return self.condition
        is_site = matches(self.wrapper.sites, path)
        if isinstance(module, LAYER_TYPES):  # listed if no site is found
            self.candidates.add(path)
        if not is_site:
            return next_fun(*args, **kwargs)
        check_layer(module, path)
        self.sites.add(path)
        y = next_fun(*args, **kwargs)
        if not self.wrapper.enabled:  # only now, so that the pattern is checked all the same
            return y
        x = args[0] if args else kwargs["inputs"]  # the name that all LAYER_TYPES give it
        try:
            return y + self._adapter(module)(module, x, self._condition_at(path))
        except flax.errors.NameInUseError:
            raise UserError(
                f"LoRA site '{path}' has an adapter already. Attach adapters once; several at one site are "
                "a SumOfAdapters."
            ) from None
        except flax.errors.ScopeParamShapeError as error:
            raise UserError(
                f"LoRA site '{path}' got a condition or an input of a different width from that at "
                f"initialisation ({str(error).split('. (http')[0]}). Give arrays of the same width."
            ) from error

    def _taps(self, path: str) -> bool:
        pattern = self.wrapper.condition
        return isinstance(pattern, str) and matches(pattern, path)

    def _adapter(self, layer: nn.Module) -> nn.Module:
        """The layer's adapter, made once per call."""
        if id(layer) not in self.adapters:  # holding on to the layer keeps its id from being reused
            adapter = self.wrapper.template.adapter.clone(parent=layer, name=ADAPTER)
            object.__setattr__(adapter, _MARK, True)  # Flax freezes modules outside of setup
            self.adapters[id(layer)] = (layer, adapter)
        return self.adapters[id(layer)][1]

    def _condition_at(self, path: str) -> Any:
        if not self.tapped:
            raise UserError(
                f"LoRA site '{path}' was reached before a submodule that matches the condition pattern "
                f"{self.wrapper.condition!r}. Submodules so far: {sorted(self.paths)}. Tap a module that "
                "runs earlier, or pass a function of the call's arguments as the condition."
            )
        return self.condition

    def check(self) -> None:
        """Raises UserError if no site was reached, listing the layers that could be one."""
        if not self.sites:
            raise UserError(
                f"The LoRA site pattern {self.wrapper.sites!r} matches no layer. "
                f"Candidates: {', '.join(sorted(self.candidates)) or 'none (it has no such layer)'}."
            )


def matches(pattern: str, path: str) -> bool:
    """Whether the whole of '/path' or 'path' matches, so that r'.*/qkv' also finds a top-level 'qkv'."""
    return bool(re.fullmatch(pattern, path) or re.fullmatch(pattern, "/" + path))


@dataclasses.dataclass(frozen=True)
class Template:
    """Wraps an adapter so that Flax does not register it as a submodule."""

    adapter: nn.Module


class Adapted(nn.Module):
    """A module with adapters at its sites; made by `attach`, called like the module itself.

    It shares the module's scope: base parameters keep the paths that they have without LoRA, and the
    adapter of a layer lies below it in the subtree `lora`.

    Attributes:
        module: the base.
        sites: pattern of the adapted layers' paths.
        template: the adapter, unbound; each site gets a copy.
        condition: pattern of the tapped submodule's path, or a function of the call's arguments.
        enabled: False bypasses the adapters: the base alone, with the same variables.
    """

    module: nn.Module
    sites: str
    template: Template
    condition: str | Callable[..., Any]
    enabled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is not None:  # None until init, apply or a parent binds the module
            nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base with the adapters in place."""
        condition = self.condition(*args, **kwargs) if callable(self.condition) else None
        if callable(self.condition) and condition is None:
            raise UserError(
                "The LoRA condition function returned None; it must return the condition of every call, an "
                "array of zeros where there is none."
            )
        call = _Call(self, condition)
        with nn.intercept_methods(call.intercept):
            result = self.module(*args, **kwargs)
        call.check()
        return result


def attach(
    module: nn.Module,
    *,
    sites: str,
    adapter: nn.Module,
    condition: str | Callable[..., Any],
) -> Adapted:
    """Returns `module` with a conditioned low-rank adapter at each site (arXiv 2405.03958).

    At initialisation the result computes exactly what `module` does, and its base parameters have
    the paths and values that they have without LoRA. Works under jit, grad, vmap (of single inputs, too)
    and nn.remat. A condition that is tapped must come from outside nn.scan and nn.remat regions.

    Args:
        module: any linen module, used unchanged.
        sites: regular expression for the '/'-joined paths, relative to `module`, of the Dense,
            DenseGeneral and Conv layers to adapt; it must match the whole path.
        adapter: `UCLoRA`, `TimeLoRA`, `ClassLoRA`, `SumOfAdapters`, or your own module called as
            (layer, x, condition) -> delta.
        condition: regular expression for the path of the submodule whose output is the condition,
            or a function of the call's arguments that returns it, [B, E] for UC-LoRA.

    Raises:
        UserError: arguments of other types, or invalid sizes or patterns; at the first call: no layer
            matches (the error lists the candidates), a matching layer cannot be adapted, or no condition
            was tapped.
    """
    for name, value in (("module", module), ("adapter", adapter)):
        if not isinstance(value, nn.Module):
            made = "; call it to make one" if isinstance(value, type) else ""
            raise UserError(
                f"The {name} that lora.attach got is {_kind(value)}; expected an instance of a linen "
                f"module{made}."
            )
    if not isinstance(sites, str):
        raise UserError(
            f"The argument sites of lora.attach is {_kind(sites)}; expected one regular expression for the "
            "layers' paths, such as '.*/(qkv|proj)'."
        )
    if not isinstance(condition, str) and not callable(condition):
        raise UserError(
            f"The condition that lora.attach got is {_kind(condition)}; expected a regular expression for "
            "the path of a submodule, or a function of the call's arguments."
        )
    if isinstance(module, Adapted):
        raise UserError(
            f"This module has adapters already, at {module.sites!r}. Attach to the base (its field "
            "`module`) once, with a pattern for all sites; several adapters at one site are a SumOfAdapters."
        )
    for name, pattern in (("site", sites), ("condition", condition)):
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"The LoRA {name} pattern {pattern!r} is not a regular expression: {error}."
                ) from error
    if hasattr(adapter, "validate"):
        adapter.validate()
    return Adapted(module, sites=sites, template=Template(adapter), condition=condition)


def _kind(value: Any) -> str:
    """What something is, for a message: `the class UCLoRA`, `of type list`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"


def composition_weights(
    wrapped: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, jax.Array | dict[tuple[str, ...], jax.Array]]:
    """Runs a module with adapters and returns site path -> omega [B or 1, m].

    A site with several adapters (`SumOfAdapters`) has a dictionary (adapter's name,) -> omega. Sites
    inside nn.scan or nn.vmap have a leading axis for their copies.

    Raises:
        UserError: a site recorded no weights.
    """
    _, state = wrapped.apply(variables, *args, mutable=["intermediates"], **kwargs)
    weights: dict = {}
    for path, values in traverse_util.flatten_dict(state.get("intermediates", {})).items():
        if path[-1] != "omega" or ADAPTER not in path:
            continue
        # sow collects a tuple: a site that was called several times gives its last weights.
        at = path.index(ADAPTER)
        site, rest = "/".join(path[:at]), path[at + 1 : -1]
        if rest:
            weights.setdefault(site, {})[rest] = values[-1]
        else:
            weights[site] = values[-1]
    if missing := [s for s in list_sites(variables.get("params", {})) if s not in weights]:
        raise UserError(
            f"The LoRA site '{missing[0]}' recorded no composition weights. If it lies inside nn.scan or "
            "nn.vmap, give that variable_axes={'params': 0, 'intermediates': 0}; adapters that are switched "
            "off have none."
        )
    return weights
