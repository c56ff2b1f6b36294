"""The worked examples of docs/extending.md, read from the page as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def example_files() -> dict[str, str]:
    """The page's blocks that are files, by the names in their first lines."""
    blocks = re.findall(r"^```\w+\n(# (\S+)\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {name: content for content, name in blocks}


def example_commands(section: str) -> list[list[str]]:
    """The commands of a section, each in words."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)  # an indented line there is code
    lines = re.sub(r" \\\n +", " ", text).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ")]


def example_settings(section: str) -> list[str]:
    """What `key=value` the section's training commands give."""
    return [
        word
        for command in example_commands(section)
        if "platform/launch.py" in command
        for word in command
        if "=" in word and not word.startswith("-")
    ]
