"""Files by name, without PyTorch: those of configs/, and the architectures that open_clip brings along."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from emcl.errors import UserError
from emcl.suggestions import nearest


def configs_folder() -> Path:
    """Where configs/ lies: in the checkout, or in the installed wheel."""
    from importlib.resources import files

    return Path(str(files("emcl.configs")))


def is_file(path: Path) -> bool:
    """Whether there is such a file; no error where the name alone makes that impossible, as one too long does."""
    try:
        return path.is_file()
    except OSError:
        return False


def find_file(name: str, kind: str) -> Path:
    """A path as given (from the working directory), or one of configs/ (with or without its ending).

    Raises:
        UserError: neither exists; lists the files of `kind`.
    """
    shipped = configs_folder()
    relative = name.removeprefix("configs/")
    for candidate in (Path(name), shipped / relative, shipped / kind / relative):
        for path in (candidate, Path(f"{candidate}.yaml")):
            if is_file(path):
                return path
    known = shipped_files(kind)
    raise UserError(
        f"no such {kind} file: {name}{nearest(name, known)} (shipped in configs/{kind}: {', '.join(known)})"
    )


def shipped_files(kind: str) -> list[str]:
    """What configs/KIND holds, without endings; those of a folder in it after the others."""
    folder = configs_folder() / kind
    found = [path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix in (".yaml", ".json")]
    return [str(path.with_suffix("")) for path in sorted(found, key=lambda path: (len(path.parts), path))]


def find_architecture(name: str) -> Path | None:
    """The JSON file behind `model.name`: a path, one of configs/model, or one of open_clip's.

    None stands for one that open_clip finds by itself (`local-dir:PATH`, `hf-hub:NAME`).

    Raises:
        UserError: no such name or file.
    """
    for path in (Path(name), configs_folder() / "model" / f"{name}.json"):
        if path.suffix == ".json" and is_file(path):
            return path
    if ":" in name:
        return None
    package = find_spec("open_clip")
    folders = package.submodule_search_locations if package else None
    known = {path.stem: path for folder in folders or [] for path in Path(folder, "model_configs").glob("*.json")}
    if name not in known:
        raise UserError(
            f"unknown model.name {name!r}{nearest(name, sorted(known))} (an open_clip name, or a JSON file in its "
            "format)"
        )
    return known[name]
