"""Replaces secrets by *** in everything that leaves the run's own folder: MLflow, logs, exports."""

from __future__ import annotations

import os
import re

NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables and of a URL's parameters whose values are secrets."""
SHORTEST = 6
"""Characters: a shorter value would match too much other text."""
_CREDENTIALS = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
_PARAMETER = re.compile(r"([?&]([\w.-]+)=)([^&\s\"']+)")
_SIGNED = re.compile(r"sig|signature", re.IGNORECASE)
MASK = "***"


def masked(text: str) -> str:
    """`text` without the values of secret environment variables, and without a URL's password or signature."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, MASK)
    text = _CREDENTIALS.sub(rf"\1{MASK}@", text)
    return _PARAMETER.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    name = match.group(2)
    secret = NAMES.search(name) or _SIGNED.search(name)
    return match.group(1) + (MASK if secret else match.group(3))
