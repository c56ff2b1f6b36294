"""A split as the loaders take it: its shards, how its captions become text input, and remembered features if any."""

from __future__ import annotations

from dataclasses import dataclass

from emcl.data.features import FeatureStore
from emcl.data.shards import ShardSet
from emcl.data.text import TextSource


@dataclass(frozen=True)
class Source:
    shards: ShardSet
    texts: TextSource
    features: FeatureStore | None = None
