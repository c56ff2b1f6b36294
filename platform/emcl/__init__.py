"""Video-and-language pretraining on a CLIP backbone with Expectation-Maximization Contrastive Learning.

`emcl.load(path)` opens a trained model; `emcl.EMCL` is the layer for anyone's training loop, and
`emcl.SharedFactors` scores pairs of any model's features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emcl.version import __version__

if TYPE_CHECKING:
    from emcl.em import EMCL, SharedFactors
    from emcl.inference import VideoTextModel, load

__all__ = ["EMCL", "SharedFactors", "VideoTextModel", "__version__", "load"]

_HOME = {"EMCL": "emcl.em", "SharedFactors": "emcl.em", "load": "emcl.inference", "VideoTextModel": "emcl.inference"}


def __getattr__(name: str) -> Any:
    """Imports on first use: `import emcl` alone must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'emcl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
