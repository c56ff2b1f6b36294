"""The run's EMCL layer, as each task has one of its own."""

from __future__ import annotations

from typing import Any

from emcl.config import Config
from emcl.em import EMCL
from emcl.errors import UserError

INFERENCE_MODULE: dict[str, Any] = {"bases": 64, "beta": 0.5, "balance": 0.0}
"""The compact variant on features of a model that was trained without it."""


def emcl_layer(config: Config, width: int, **changes: Any) -> EMCL | None:
    """A layer for rows of `width` by `emcl.*` of the configuration, with `changes` of its arguments; None where off.

    Raises:
        UserError: settings that the layer refuses, such as more bases than the rows are wide.
    """
    chosen = config.emcl
    if not chosen.enabled:
        return None
    settings: dict[str, Any] = {
        "bases": chosen.k,
        "iterations": chosen.iterations,
        "temperature": chosen.temperature,
        "beta": chosen.beta,
        "momentum": chosen.momentum,
        "balance": chosen.balance,
        "variant": chosen.variant,
        "width": width,
        "seed": config.seed,
    }
    try:
        return EMCL(**{**settings, **changes})
    except ValueError as error:
        raise UserError(f"emcl.*: {error}") from None
