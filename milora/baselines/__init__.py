"""Other methods, written as well as we can, so that comparisons are fair."""

from milora.baselines.token_mixture import (
    TokenMixtureConfig,
    TokenMixtureLinear,
    attach_token_mixture,
    detach_token_mixture,
)

__all__ = [
    "TokenMixtureConfig",
    "TokenMixtureLinear",
    "attach_token_mixture",
    "detach_token_mixture",
]
