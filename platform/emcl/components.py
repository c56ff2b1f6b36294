"""The parts of a model, of its training and of its evaluation that are chosen by name; without PyTorch.

Those of this package stand here, each table in one line; another package registers its own under the table's
entry-point group, as tasks are registered (registry.py). No import fills a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from importlib.metadata import EntryPoint
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any

from emcl.errors import UserError, first_line
from emcl.installed import entry_points
from emcl.settings import as_group, build, fields
from emcl.suggestions import nearest

DISTRIBUTION = "emcl-platform"
"""This package, as pip knows it."""


def load_entry(entry: EntryPoint, name: str) -> Any:
    """What an entry point names; this imports it.

    Raises:
        UserError: it cannot be imported; the line begins with `name`.
    """
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        package = entry.dist.name if entry.dist else "its package"
        again = "; install the package again, as after every update" if package == DISTRIBUTION else ""
        raise UserError(f"{name}: {entry.value} of {package} cannot be imported: {first_line(error)}{again}") from None


@dataclass(frozen=True)
class Components:
    """Parts of one kind by name."""

    setting: str
    """The setting that chooses one, such as `optim.optimizer`; `optim.optimizer_options` is the table of what is that
    one's own."""
    group: str
    """The entry-point group in which other packages register theirs."""
    built_in: Mapping[str, str]
    """By name, the module and what it is called there; these names are taken."""

    def names(self) -> list[str]:
        return [*self.built_in, *sorted({entry.name for entry in entry_points(group=self.group)} - {*self.built_in})]

    def check(self, name: str) -> None:
        """Whether there is such a part; nothing is imported.

        Raises:
            UserError: there is none; names the nearest and lists all.
        """
        if name not in self.built_in and not entry_points(group=self.group, name=name):
            names = self.names()
            listed = f"{', '.join(names)}{nearest(name, names)}"
            raise UserError(f"{self.setting}={name} is none of {listed} (or install the package that brings it)")

    def load(self, name: str) -> Any:
        """What has the name; this imports it. Of two packages' parts of one name, the first that is found.

        Raises:
            UserError: no such part, or its package cannot be imported.
        """
        if name in self.built_in:
            return resolve_name(self.built_in[name])
        self.check(name)
        entry = next(iter(entry_points(group=self.group, name=name)))
        return load_entry(entry, f"{self.setting}={name}")

    def load_class(self, name: str, base: type) -> Any:
        """A class that extends `base`.

        Raises:
            UserError: as `load`, or it extends something else.
        """
        kind = self.load(name)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise UserError(f"{self.setting}={name}: {kind!r} does not extend {base.__module__}.{base.__qualname__}")
        return kind

    def options(self, name: str, table: Mapping[str, str]) -> Any:
        """The settings of the part's own, an instance of its `config_class`; None where it has none.

        A part that is a dataclass is its own settings: this gives the part itself.

        Raises:
            UserError: one that it does not know, or a value that it does not take.
        """
        kind = self.config_class(name)
        if table and not fields(kind):
            raise UserError(
                f"{self.setting}_options.{next(iter(table))}: {name} has no settings of its own "
                f"({self.setting}_options={{}} forgets those of another)"
            )
        return None if kind is None else build(kind, dict(table), f"{self.setting}_options.")

    def config_class(self, name: str) -> Any:
        """The group of the part's own settings; None where it has none.

        Raises:
            UserError: it cannot be imported, or is no group.
        """
        component = self.load(name)
        own: Any = getattr(component, "config_class", None)
        if own is None and isinstance(component, type) and is_dataclass(component):
            own = component
        try:
            return None if own is None else as_group(own)
        except (TypeError, AttributeError) as error:
            raise UserError(f"{self.setting}={name}: {first_line(error)}") from None


BACKBONES = Components(
    "model.backbone", "emcl.backbones", {"open_clip": "emcl.model.open_clip_backbone:OpenClipBackbone"}
)
"""Classes that extend `emcl.model.backbone.Backbone`."""

REGULARISERS = Components("model.regulariser", "emcl.regularisers", {"emcl": "emcl.model.emcl_layer:EMCLLayer"})
"""Classes that extend `emcl.model.regulariser.Regulariser`."""

OPTIMIZERS = Components(
    "optim.optimizer",
    "emcl.optimizers",
    {
        "adamw": "emcl.train.optimizer:AdamW",
        "bert_adam": "emcl.train.bert_adam:BertAdamKind",
        "sgd": "emcl.train.optimizer:SGD",
    },
)
"""Classes that extend `emcl.train.optimizer.OptimizerKind`."""

SCHEDULES = Components(
    "optim.schedule",
    "emcl.schedules",
    {
        "cosine": "emcl.train.schedule:cosine",
        "warmup_cosine": "emcl.train.schedule:warmup_cosine",
        "linear": "emcl.train.schedule:linear",
        "constant": "emcl.train.schedule:constant",
    },
)
"""Functions (optimizer, warm-up steps, steps) -> PyTorch's scheduler; without settings of their own."""

RESCORINGS = Components(
    "evaluate.rescoring",
    "emcl.rescorings",
    {
        "none": "emcl.metrics.rescoring:Rescoring",
        "dsl": "emcl.metrics.rescoring:DualSoftmax",
        "qb_norm": "emcl.metrics.rescoring:QueryBank",
    },
)
"""Dataclasses that extend `emcl.metrics.rescoring.Rescoring`; their fields are their settings."""

TABLES = (BACKBONES, REGULARISERS, OPTIMIZERS, SCHEDULES, RESCORINGS)
"""Of all kinds."""


def check_names(config: Any) -> None:
    """Whether there are such parts as a `Config` names; nothing is imported.

    A run that has ended is not asked: it is loaded without its optimiser, and reported without its backbone.

    Raises:
        UserError: there is one that is not.
    """
    for table in TABLES:
        table.check(attrgetter(table.setting)(config))


def check_components(config: Any, *, training: bool = True) -> None:
    """Whether a model's parts can be imported, with their own settings, and those of its training.

    An evaluation has no optimiser; its rescoring is checked by `emcl.metrics.rescoring.check_rescoring`.

    Raises:
        UserError: one cannot, or has no such setting.
    """
    model, optim = config.model, config.optim
    BACKBONES.options(model.backbone, model.backbone_options)
    REGULARISERS.options(model.regulariser, model.regulariser_options)
    if not training:
        return
    OPTIMIZERS.options(optim.optimizer, optim.optimizer_options)
    SCHEDULES.load(optim.schedule)
