"""Sphinx settings, and two directives that print settings and flags as the code has them."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

import typer
from sphinx.util.docutils import SphinxDirective

import rlhf_env
from rlhf_env.cli import app as commands
from rlhf_env.records.config import documented

project = "rlhf-env"
author = copyright = "rlhf-env contributors"
release = version = rlhf_env.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"rlhf-env {release}"
html_show_copyright = False
default_role = "code"  # docstrings write `names` in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


class Settings(SphinxDirective):
    """`.. settings:: module:Class` lists the settings of a dataclass: name, default, sentence."""

    required_arguments = 1

    def run(self) -> list[Any]:
        module, _, name = self.arguments[0].partition(":")
        cls = getattr(import_module(module), name)
        defaults = {field.name: field.default for field in fields(cls)}
        rows = [(key, repr(defaults[key]), text) for key, text in documented(cls).items() if key in defaults]
        return self.parse_text_to_nodes(_table(("setting", "default", "meaning"), rows))


class Flags(SphinxDirective):
    """`.. flags:: COMMAND [SUBCOMMAND]` prints what a command does, its flags, and the settings that have no flag."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[Any]:
        command: Any = typer.main.get_command(commands)
        for name in self.arguments[0].split():
            command = command.commands[name]
        rows = [(p.opts[0] if p.opts[0].startswith("-") else p.metavar or p.name, p.help or "") for p in command.params]
        more = [line.strip().partition(": ") for line in (command.epilog or "").splitlines() if line.startswith("  ")]
        text = f"{command.help}\n\n" + (_table(("flag", "meaning"), rows) if rows else "")
        if more:
            text += "\n\n" + _table(("KEY=VALUE", "meaning"), [(key, meaning) for key, _, meaning in more])
        return self.parse_text_to_nodes(text)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A list-table whose columns are code, but for the last one."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for row in (head, *rows):
        cells = row if row is head else (*(f"``{cell}``" for cell in row[:-1]), row[-1])
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
    return "\n".join(lines) + "\n"


def setup(app: Any) -> None:
    app.add_directive("settings", Settings)
    app.add_directive("flags", Flags)
