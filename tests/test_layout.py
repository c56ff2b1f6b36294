"""What holds the house together: no package named `platform`, imports that go down only, a complete wheel."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from conftest import ROOT
from worked_examples import example_files

PACKAGE = ROOT / "platform" / "emcl"
DOCS = sorted((ROOT / "docs").glob("*.md"))
FLOORS = (
    {"disk", "errors", "version", "secrets", "async_sender", "prefetch", "suggestions", "installed"},
    {"inline_values"},
    {"settings", "components"},
    {"em", "registry", "resources", "recipe", "kinds", "metrics"},
    {"config", "distributed"},
    {"run_lock", "run_folder"},
    {"data"},
    {"prepare", "model", "pictures"},
    {"task"},
    {"multitask", "tasks"},
    {"tracking", "evaluate"},
    {"train"},
    {
        "inference",
        "features",
        "given_videos",
        "devices",
        "config_docs",
        "published_protocol",
        "arguments",
        "report",
        "doctor",
    },
    {"deviation_tables"},
    {"search"},
    {"serve"},
    {"launch", "cli", "cli_features", "cli_search"},
)
"""From the ground up; a module imports from its own floor and from those below. `task` is the tasks' base class.

Each part's `*_settings` stand with the `settings` that they are made of, on which all else is built."""


def test_platform_is_no_package_and_holds_nothing_beside_the_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), "torch imports the standard library's `platform`"
    tracked = subprocess.run(
        ["git", "ls-files", "platform"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {Path(name).parts[1] for name in tracked} == {"launch.py", "emcl"}


def test_an_init_file_there_is_what_breaks(tmp_path: Path) -> None:
    """The trap itself: with the file, torch finds ours in place of the standard library's."""
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "__init__.py").touch()
    code = "import platform; platform.system()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "has no attribute 'system'" in done.stderr


def floor_of(module: str) -> int:
    top = "settings" if module.endswith("settings") else module.split(".")[1]
    return next(number for number, names in enumerate(FLOORS) if top in names)


def modules() -> list[tuple[str, Path]]:
    named = [
        (f"emcl.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}", path) for path in PACKAGE.rglob("*.py")
    ]
    named += [(f"emcl.tasks.{path.stem}", path) for path in (ROOT / "tasks").glob("*.py")]
    return [(name, path) for name, path in named if name != "emcl.__init__"]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_imports_go_down_only(module: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:  # an import inside a function is for speed at start, or a lazy look-up
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("emcl."):
                assert floor_of(name) <= floor_of(module), f"{module} imports {name}, which lies above it"


def test_only_one_module_touches_torch_distributed() -> None:
    users = [name for name, path in modules() if "torch.distributed as" in path.read_text()]
    assert users == ["emcl.distributed"]


def test_every_subpackage_is_in_the_wheel() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    existing = {"emcl", "emcl.tasks", "emcl.configs"}
    existing |= {f"emcl.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert listed == existing


def test_no_two_files_have_one_name() -> None:
    """A name says which file is meant. `platform/launch.py` is the command, which calls `emcl/launch.py`."""
    listed = ["git", "ls-files", "platform/*.py", "tasks/*.py", "benchmarks/*.py"]
    paths = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = Counter(Path(path).name for path in paths)
    assert {name for name, count in names.items() if count > 1} == {"__init__.py", "launch.py"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS)])
def test_a_page_names_files_that_there_are(page: str) -> None:
    """As paths from the checkout's top, or from within the package."""
    named = re.findall(
        r"`((?:\w+/)*[a-z]\w*\.py)[`:]|^    ((?:\w+/)+\w+\.py)\b", (ROOT / page).read_text(), re.MULTILINE
    )
    named = [path for path in map("".join, named) if path not in example_files()]  # those the page itself is made of
    assert not [path for path in named if not any((top / path).exists() for top in (ROOT, PACKAGE))]


def test_the_page_of_settings_is_what_the_code_says() -> None:
    from emcl.config_docs import describe

    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == describe(), "run: emcl config --describe > docs/configuration.md"
