"""What ``--help`` prints: names of options are whole at any width, and lines of a paragraph are joined."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

NAMES = 26
"""Columns for names beside what is said of them; longer names have a line of their own above it."""
EXAMPLE = "[bold]"
"""Begins a line that is to be typed, which is joined with no other."""


def print_help(command: Any, context: Any) -> None:
    """Print the help of a command, or of all of them.

    Args:
        command: a command or group of Typer.
        context: its context, which knows what it was called as.
    """
    console = Console(highlight=False)
    console.print()
    console.print(Padding(Text(command.get_usage(context), style="bold"), (0, 1)))
    for paragraph in _paragraphs(command.help):
        console.print()
        console.print(Padding(paragraph, (0, 1)))
    console.print()
    panels: dict[str, list[tuple[Text, str]]] = {}
    for item in command.get_params(context):
        if not getattr(item, "hidden", False):
            what = "Arguments" if item.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(item, "rich_help_panel", None) or what, []).append(
                (_names(item), item.help or "")
            )
    # What every command has comes first.
    for title in sorted(panels, key=lambda title: title not in ("Arguments", "Options")):
        console.print(_panel(title, panels[title]))
    if names := getattr(command, "commands", None):
        found = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
        about = [(Text(name, style="bold cyan"), _first(item.help)) for name, item in found if not item.hidden]
        console.print(_panel("Commands", about, max(map(len, names))))
    if command.epilog:
        console.print()
        console.print(Padding(Text.from_markup(command.epilog, style="dim"), (0, 1)))


def _paragraphs(help: str | None) -> Iterator[Text]:
    for paragraph in inspect.cleandoc(help or "").split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and not line.startswith(EXAMPLE) and not lines[-1].startswith(EXAMPLE):
                lines[-1] += f" {line}"
            else:
                lines.append(line)
        yield Text.from_markup("\n".join(lines))


def _first(help: str | None) -> str:
    return next(_paragraphs(help)).markup


def _names(item: Any) -> Text:
    """All names of an option with what stands for its value, or that of an argument."""
    value = item.metavar or ""
    if item.param_type_name == "argument":
        return Text(value or item.name.upper(), style="bold yellow")
    # One that may be broken is broken between names.
    names = Text(", ".join([*item.opts, *item.secondary_opts]), style="bold cyan")
    return names.append(f" {value}", style="bold yellow") if value else names


def _panel(title: str, entries: Sequence[tuple[Text, str]], width: int = NAMES) -> Panel:
    width = min(width, max(len(names) for names, _ in entries))
    shown: list[RenderableType] = []
    for names, said in entries:
        about = Text.from_markup(said)
        if len(names) > width:
            shown += [names, Padding(about, (0, 0, 0, width + 2))]
            continue
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        line.add_column(width=width, no_wrap=True)
        line.add_column(ratio=1)
        line.add_row(names, about)
        shown.append(line)
    return Panel(Group(*shown), title=title, title_align="left", border_style="dim")
