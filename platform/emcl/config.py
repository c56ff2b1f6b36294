"""Every setting of a run; YAML files and `key=value` overrides on top of the defaults.

A recipe is a YAML file of configs/recipe/. It may `include:` other files of configs/ (`model/vit_b_32`), which
are merged in order before it. Overrides come last. Unknown keys and impossible values are errors that name the key.
Each part of the work keeps its own group of settings beside its code, in a module `*_settings`; none imports PyTorch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from emcl.components import check_names
from emcl.data.data_settings import DataConfig
from emcl.errors import UserError, first_line, said_of
from emcl.evaluate.evaluate_settings import EvaluateConfig
from emcl.kinds import Kinds, check_known, check_new, kinds_in
from emcl.model.model_settings import EMCLConfig, ModelConfig
from emcl.recipe import Overrides, as_written, parse_overrides, read_recipe
from emcl.registry import EVERY_TASK, is_built_in, settings_of, task_entries
from emcl.resources import find_file
from emcl.secrets import masked
from emcl.settings import Seconds, Steps, Tree, build, former_keys, former_names, group, merge, nested, subgroups
from emcl.train.train_settings import CheckpointConfig, OptimConfig

log = logging.getLogger("emcl")
DEFAULT_RECIPE = "sample"
SAID = "EMCL_RENAMED_SAID"
"""The variable in which a process tells those that it starts which former names have been reported."""
LONGEST_NAME = 200
"""Bytes: of the 255 that a file system has for a name."""


def _stays_in_runs(name: str) -> str:
    taken = name.strip() in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable()
    if taken or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"name={name!r} is no name of a folder in `runs`: it may not be blank, `.` or `..`, nor hold a slash or "
            f"what is not printed, nor be longer than {LONGEST_NAME} bytes"
        )
    return name


@group
class TrackingConfig:
    """What MLflow records."""

    enabled: bool = Field(True, description="Record the run in MLflow.")
    experiment: str = Field("emcl", min_length=1, description="MLflow's, in which runs are compared.")
    every_steps: Steps = Field(10, ge=1, description="Between two records.")
    profile: Steps = Field(
        0, ge=0, description="Profile so many steps after the first few: a trace and a summary (`--profile N`)."
    )


@group
class Config:
    """One run."""

    seed: int = Field(0, ge=0, lt=2**32, description="Of weights, order, captions, augmentation.")
    name: Annotated[str, AfterValidator(_stays_in_runs)] | None = Field(
        None, description="Of a new run; one that a run has is refused. Made from task and time where not given."
    )
    runs: str = Field("runs", min_length=1, description="Folder of all runs.")
    precision: Literal["fp32", "bf16", "fp16", "clip_fp16"] = Field(
        "fp32",
        description=(
            "Of weights, activations and gradients; the optimiser keeps its own in fp32. `clip_fp16`, as in EMCL-Net's "
            "code: the matrices of CLIP's towers, their gradients and moments in fp16, without fp32 copies; all else "
            "in fp32."
        ),
    )
    tf32: bool = Field(
        False,
        description=(
            "On GPUs, products and convolutions of fp32 numbers in TF32: several times as fast, with 10 of their 23 "
            "bits. EMCL's own stay exact."
        ),
    )
    deterministic: bool = Field(
        False,
        description="On GPUs, the same bits in every run on the same machines, as on CPUs anyway (docs/operations.md).",
    )
    patience: Seconds = Field(
        600.0,
        gt=0,
        description=(
            "Some rank has to get on in this time (with a step, a batch of an evaluation, a video's features) "
            "before the run ends, naming the rank that the others wait for; six times that for what does not say "
            "how it gets on, such as saving. A rank that gives no sign of life for 20 seconds is named at once."
        ),
    )
    deepspeed: str = Field(
        "deepspeed/zero1.json",
        description=(
            "A DeepSpeed JSON file: a path, or one of configs/. Batch size, precision and clipping come from here."
        ),
    )
    tasks: dict[str, Any] = Field(
        default_factory=dict, description="Settings of each active task; the task's own class says which."
    )
    kinds: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Further names of tasks, for several of one kind: `--task captioning,short kinds.short=captioning "
            "tasks.short.layers=1`."
        ),
    )
    uncertainty_weights: bool = Field(
        False,
        description=(
            "Weigh the tasks' losses by learned uncertainties (Kendall et al., CVPR 2018), besides their `weight`."
        ),
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    emcl: EMCLConfig = Field(default_factory=EMCLConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    def kind_of(self, task: str) -> str:
        """The task's own name, by which it is installed, for the name that it has in this run."""
        return self.kinds.get(task, task)

    def alias_of(self, task: str) -> str:
        """The name that its files begin with, so that tasks with one scorer have files of their own.

        Empty for this package's own tasks under their own names.
        """
        return "" if task not in self.kinds and is_built_in(task) else task

    def chooses_by(self) -> str | None:
        """The shards of the split that is scored while training and chooses the best model, if there is one."""
        return self.data.test if self.evaluate.select == "test" else self.data.val

    def __post_init__(self) -> None:
        if self.evaluate.select == "test" and not self.data.test:
            raise ValueError("evaluate.select=test wants data.test, by whose scores the best model is chosen")
        if not self.model.cache_features:
            return
        if not {"image", "text"} <= set(self.model.frozen):
            raise ValueError(
                "model.cache_features=true wants model.frozen=[image,text]: a tower that learns has no lasting features"
            )
        if self.model.absent_frames == "grey":
            raise ValueError("model.cache_features=true excludes model.absent_frames=grey, which is not cached")
        if self.data.jitter or self.data.augment != "none":
            raise ValueError(
                "model.cache_features=true excludes data.jitter and data.augment, which change the frames every epoch"
            )


def resolve(
    tasks: Sequence[str] | None,
    recipe: str = DEFAULT_RECIPE,
    overrides: Iterable[str] = (),
    *,
    kind_of: Callable[[str], Any] = settings_of,
    kinds: Kinds | None = None,
) -> Config:
    """Defaults, then the recipe and what it includes, then `key=value` overrides, for the named tasks.

    Without `tasks`, those that the recipe has settings for.

    Args:
        kinds: further names of tasks that a run has which is to be scored with a recipe; they stand.

    Raises:
        UserError: unknown task, recipe or key, ill-typed or impossible value.
    """
    path = find_file(recipe, "recipe")
    layers, of_run = read_recipe(path), dict(kinds or {})
    with said_of(str(path)):
        own = kinds_in(layers)
    check_new(
        {
            name: kind
            for name, kind in kinds_in([{"kinds": own}], parse_overrides(overrides)).items()
            if name not in of_run
        }
    )
    layers = [*layers, {"kinds": of_run}]
    config = from_dict(layers, tasks, overrides=overrides, source=str(path), kind_of=kind_of, saved=False)
    check_names(config)
    return config


def from_dict(
    layers: Sequence[Tree],
    tasks: Sequence[str] | None = None,
    *,
    overrides: Iterable[str] = (),
    source: str = "",
    kind_of: Callable[[str], Any] = settings_of,
    saved: bool = True,
) -> Config:
    """A checked Config from trees that are merged in order, then overrides; `tasks` are those of them if not given.

    Args:
        source: where the trees come from; it begins the line on an error that is theirs.
        kind_of: gives the class of a task's settings; `early_settings_of` knows those without PyTorch alone, and the
            settings of other tasks are left out then.
        saved: whether the trees are a run's own, in which former names of settings stand without a word.

    Raises:
        UserError: unknown task or key, ill-typed or impossible value.
    """
    given = parse_overrides(overrides)
    with _said_of(source):
        own = kinds_in(layers)
    kinds = kinds_in([{"kinds": own}], given)
    tables = [name for layer in layers for name in _tasks(layer.get("tasks"))]
    names = tables if tasks is None else [*task_entries(), *kinds] if list(tasks) == [EVERY_TASK] else tasks
    if not names:
        with _said_of(source):
            raise UserError("no task is named: give --task")
    with _said_of(source if tasks is None else ""):
        for name in names:
            check_known(name, kinds, may_be_further=tasks is not None)
    for name, kind in kinds_in([], given).items():
        if name not in names:
            raise UserError(
                f"kinds.{name}={kind}: {name} is none of this run's tasks ({', '.join(names)}); --task names them"
            )
    try:
        return _built(layers, names, given, kinds, kind_of, saved=saved)
    except UserError:
        with _said_of(source):  # raises where the trees alone are wrong
            _built(layers, [], [], {**kinds, **own}, kind_of, saved=saved)
        raise


def _said_of(source: str) -> AbstractContextManager[None]:
    return said_of(source) if source else nullcontext()


def _built(
    layers: Sequence[Tree],
    names: Sequence[str],
    given: Overrides,
    kinds: Kinds,
    kind_of: Callable[[str], Any],
    *,
    saved: bool,
) -> Config:
    tables = {name: None for layer in layers for name in _tasks(layer.get("tasks"))}
    for name in tables:
        check_known(name, kinds, may_be_further=False)
    for key, text in given:
        _check_task(key, text, names, kinds)
    settings = {name: kind_of(kinds.get(name, name)) for name in [*names, *tables]}
    known = {name: kind for name, kind in settings.items() if kind is not None}
    schema = _schema(known)
    tree: Tree = {}
    renamed: list[tuple[str, str]] = []
    for layer in layers:
        in_layer = merge(schema, tree, {key: value for key, value in layer.items() if key != "kinds"})
        renamed += [] if saved else in_layer
    for key, text in given:
        if key.partition(".")[0] != "kinds":
            renamed += merge(schema, tree, nested(schema, key, text))
    _say_renamed(renamed)
    in_use = {name: kind for name, kind in kinds.items() if name in names}
    tree = _interpolated({**tree, "kinds": in_use}, known)
    of_tasks = tree.pop("tasks", {})
    # a recipe may hold settings for tasks that this run leaves out; they are checked all the same
    built = {name: build(kind, of_tasks.get(name, {}), f"tasks.{name}.") for name, kind in known.items()}
    config = build(Config, tree)
    assert isinstance(config, Config)
    return dataclasses.replace(config, tasks={name: built[name] for name in names if name in built})


def _schema(of_tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of settings of a run with these tasks, each with the class of its settings."""
    return {**subgroups(Config), "tasks": of_tasks}


def _say_renamed(names: Iterable[tuple[str, str]]) -> None:
    """One line for each former name, once, and by the first of a run's processes alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    for former, name in dict.fromkeys(names):
        if former not in os.environ.get(SAID, "").split():
            log.warning("%s is %s now; its old name works for one release more", former, name)
            os.environ[SAID] = f"{os.environ.get(SAID, '')} {former}".strip()


def _check_task(key: str, text: str, names: Sequence[str], kinds: Kinds) -> None:
    """Whether an override is for a task of this run, if it is for one."""
    group, _, rest = key.partition(".")
    if group != "tasks":
        return
    name = rest.partition(".")[0]
    if not rest:
        raise UserError(f"{key}={text}: --task names the tasks, tasks.NAME.KEY=VALUE sets what is theirs")
    check_known(name, kinds)
    if name not in names:
        raise UserError(f"{key}={text}: {name} is none of this run's tasks ({', '.join(names)}); --task names them")


def _tasks(settings: Any) -> Sequence[str]:
    if isinstance(settings, dict) or not settings:
        return list(settings or ())
    raise UserError(f"tasks={settings} is no table of tasks with their settings")


LATER = {
    "data": ("sampling", "resize", "resize_mode", "interpolation"),
    "model": (
        "absent_frames",
        "backbone",
        "backbone_options",
        "regulariser",
        "regulariser_options",
        "temporal_start",
        "temporal_projection",
        "head_dropout",
        "mean",
        "std",
        "tokenizer",
    ),
    "emcl": ("factors", "factor_videos"),
    "optim": (
        "optimizer",
        "optimizer_options",
        "schedule",
        "logit_scale_lr",
        "decay",
        "gather_with_grad",
        "same_video_negatives",
    ),
    "evaluate": ("rescoring", "rescoring_options", "select", "every_steps"),
    "tasks.retrieval": ("loss", "logit_bias"),
    "tasks.msrvtt_qa": ("head", "answers_counted", "answers_beyond"),
}
"""Settings, of a table or of a kind of task, that were added when people had indexes already (`fingerprint_text`)."""


def fingerprint_text(config: Config) -> str:
    """The settings by which an index knows its model.

    A new version brings new settings and renames some. An index that was made before must still know its model, so that
    those of LATER are left out while they have their defaults, which every model had when there was no choice, and all
    have their first names.
    """
    return to_yaml(config, later=False)


def to_yaml(config: Config, *, secrets: bool = True, later: bool = True) -> str:
    """The resolved configuration, readable by `from_dict`; for others to see, without `secrets`."""
    tree = dataclasses.asdict(config)
    if not config.kinds:
        del tree["kinds"]
    if not later:
        usual = Config()
        for table in ("data", "model", "emcl", "optim", "evaluate"):
            tree[table] = _without_later(table, tree[table], getattr(usual, table))
        for name, settings in config.tasks.items():
            if (table := f"tasks.{config.kind_of(name)}") in LATER:
                tree["tasks"][name] = _without_later(table, tree["tasks"][name], type(settings)())
        tree = _formerly_named(tree, _schema({name: type(one) for name, one in config.tasks.items()}))
    if not secrets:
        tree = _each_text(tree, masked, in_keys=True)  # a mixture's keys are patterns of shards
    return yaml.safe_dump(_each_text(tree, _escaped), sort_keys=False, allow_unicode=True)


def _without_later(table: str, tree: Tree, usual: Any) -> Tree:
    """Without the settings of LATER that have their defaults, which are those of `usual`."""
    return {name: value for name, value in tree.items() if name not in LATER[table] or value != getattr(usual, name)}


def _formerly_named(tree: Tree, kind: Any) -> Tree:
    """With the settings' former names, each in its place."""
    within, former = subgroups(kind), {name: old for old, name in former_names(kind).items()}
    return {
        former.get(name, name): _formerly_named(value, within[name]) if name in within else value
        for name, value in tree.items()
    }


def _each_text(value: Any, change: Callable[[str], str], *, in_keys: bool = False) -> Any:
    if isinstance(value, dict):
        return {change(key) if in_keys else key: _each_text(one, change, in_keys=in_keys) for key, one in value.items()}
    if isinstance(value, list):
        return [_each_text(one, change, in_keys=in_keys) for one in value]
    return change(value) if isinstance(value, str) else value


def _escaped(text: str) -> str:
    """With every `${` as `\\${`: it is text by now, and no more to be replaced."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def flatten(config: Config) -> dict[str, Any]:
    """`{"optim.lr": 1e-4, ...}`, for MLflow's parameters."""

    def walk(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix, value

    return dict(walk("", dataclasses.asdict(config)))


def _interpolated(tree: Tree, of_tasks: Mapping[str, Any]) -> Tree:
    """With `${data.root}` and the like replaced by the values that they name."""
    if "${" not in str(tree):
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults = dataclasses.replace(Config(), tasks={name: _default(kind) for name, kind in of_tasks.items()})
    whole = as_written(to_yaml(defaults))
    schema = _schema(of_tasks)
    merge(schema, whole, tree)

    def with_new_names(text: str) -> str:
        for former, name in former_keys(schema).items():
            text = text.replace(f"${{{former}}}", f"${{{name}}}")
        return text

    try:
        return OmegaConf.to_container(OmegaConf.create(_each_text(whole, with_new_names)), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', None) or '?'}: {first_line(error)}") from None


def _default(kind: Any) -> Any:
    """A task's settings where none is given; none where its package has a setting without a default."""
    try:
        return build(kind, {})
    except UserError:
        return {}
