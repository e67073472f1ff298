"""MiLoRA: prompt-routed mixtures of low-rank experts (arXiv 2410.18035).

In each Transformer block every linear module's LoRA is one expert; a router reads the prompt once,
before the first new token, picks the top-k experts, and the choice is kept with the KV cache.
"""

from milora import ops  # loads the library: a missing or mismatched one fails here
from milora._version import __version__
from milora.adapters import load, save
from milora.attach import adapters, attach, delete_adapter, detach, set_adapter, set_rank
from milora.config import MiLoRAConfig
from milora.errors import AdapterError, PoolError, UserError
from milora.eva import attach_eva
from milora.export import export_route
from milora.forwards import (
    activation_phase,
    disabled,
    pin_route,
    prompt_lengths,
    record_routing,
)
from milora.gradient_start import init_from_gradients
from milora.merge import merge
from milora.pool import AdapterPool
from milora.report import (
    ParameterCount,
    activation_parameters,
    balance_report,
    count_parameters,
    reset_stats,
    stats,
)
from milora.route_cache import held_by as routing_state
from milora.routing import RoutingState
from milora.runtime import Stats

__all__ = [
    "AdapterError",
    "AdapterPool",
    "MiLoRAConfig",
    "ParameterCount",
    "PoolError",
    "RoutingState",
    "Stats",
    "UserError",
    "__version__",
    "activation_parameters",
    "activation_phase",
    "adapters",
    "attach",
    "attach_eva",
    "balance_report",
    "count_parameters",
    "delete_adapter",
    "detach",
    "disabled",
    "export_route",
    "init_from_gradients",
    "load",
    "merge",
    "ops",
    "pin_route",
    "prompt_lengths",
    "record_routing",
    "reset_stats",
    "routing_state",
    "save",
    "set_adapter",
    "set_rank",
    "stats",
]
