"""Writes a page per command of arkv-bench into docs/commands, from what its --help says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FOLDER = ROOT / "docs" / "commands"


def pages() -> dict[str, str]:
    """The pages by file name."""
    import click
    import typer.main
    from typer.cli import get_docs_for_click

    from bench.cli import app

    group = typer.main.get_group(app)
    context = click.Context(group, info_name="arkv-bench")
    found = {}
    for name, command in group.commands.items():
        text = get_docs_for_click(obj=command, ctx=context, name=name, call_prefix="arkv-bench")
        found[f"{name}.md"] = f"<!-- Written by make docs. -->\n\n{_plain(text).rstrip()}\n"
    return found


def _plain(text: str) -> str:
    """Lines in bold are examples; other marks of the terminal are those of code."""
    text = re.sub(
        r"^\[bold\].*(?:\n\[bold\].*)*$",
        lambda found: "```bash\n" + re.sub(r"\[/?bold\]", "", found[0]) + "\n```",
        text,
        flags=re.MULTILINE,
    )
    return re.sub(r"\[/?bold\]", "`", text)


def main() -> None:
    """Replace the pages, and remove those of commands that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    written = pages()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()
    print(f"wrote {len(written)} pages to {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
