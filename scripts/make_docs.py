"""Writes what the code says of itself: docs/commands, a page per command; docs/layout.md, a line per file; the table of
generation settings in docs/tasks.md; the tables of the runs under results/, out of their samples; the numbers of
README.md and of pages under docs/, and their pictures, out of results/."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FOLDER = ROOT / "docs" / "commands"
LAYOUT = ROOT / "docs" / "layout.md"
TASKS = ROOT / "docs" / "tasks.md"
WITHOUT_MODULE = {
    "bench/presets": "Settings by name.",
    "scripts": "The environment, and what belongs to no command.",
    "tasks": "What is asked and how it is scored; knows nothing of caches.",
}
"""Folders that have no docstring."""
RULES_OF_IMPORTS = """\
Imports run one way: `bench` uses `tasks` and `arkv`; `tasks` knows nothing of caches, and `arkv` needs torch and
transformers only. Within `bench` each folder uses only what stands below it, on seven floors
(`tests/test_architecture.py`). Tests mirror the tree under `tests/`."""
PACKAGES = ("arkv", "bench", "tasks", "scripts")


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


def layout() -> str:
    """The tree, folder by folder: a line per module, which is the first one of its docstring."""
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    lines = ["<!-- Written by make docs. -->", "", "# The files", "", RULES_OF_IMPORTS, "", "| folder | |", "|---|---|"]
    for folder in sorted({path.parent for path in modules} | {ROOT / name for name in WITHOUT_MODULE}):
        name, module = folder.relative_to(ROOT).as_posix(), folder / "__init__.py"
        lines.append(f"| {name}/ | {WITHOUT_MODULE.get(name) or _first_line(module)} |")
    lines.append("")
    for folder in sorted({path.parent for path in modules}):
        mine = sorted(path for path in modules if path.parent == folder)
        about = {path.name: _first_line(path) for path in mine}
        said = about.pop("__init__.py", "")
        lines += [f"## {folder.relative_to(ROOT).as_posix()}", "", *([said, ""] if said else [])]
        lines += ["| file | |", "|---|---|", *(f"| {name} | {text} |" for name, text in about.items()), ""]
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    # A first sentence may go on in the next line.
    return " ".join(said.split("\n\n")[0].split()).replace("|", "\\|")


def with_settings(page: str) -> str:
    """The page about tasks with the table of generation settings as it is now."""
    from tasks.generation import RULES

    reasons = dict.fromkeys((rule.fate, rule.why) for rule in RULES.values())
    lines = ["| settings | | |", "|---|---|---|"]
    for fate, why in sorted(reasons, key=lambda reason: list(type(reason[0])).index(reason[0])):
        names = ", ".join(f"`{name}`" for name, rule in RULES.items() if (rule.fate, rule.why) == (fate, why))
        lines.append(f"| {names} | {fate} | {why} |")
    before, begin, rest = page.partition("<!-- Written by make docs: -->\n")
    _, end, after = rest.partition("\n<!-- until here. -->")
    if not begin or not end:
        raise SystemExit(f"{TASKS} has no place for the table of generation settings")
    return before + begin + "\n".join(lines) + end + after


def main() -> None:
    """Replace the pages, and remove those of commands that are gone."""
    LAYOUT.write_text(layout(), encoding="utf-8")
    TASKS.write_text(with_settings(TASKS.read_text(encoding="utf-8")), encoding="utf-8")
    from scripts import recorded
    from scripts.figures_in_docs import PAGES, pictures, with_numbers

    recorded.write()
    pictures.write()
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_numbers(page.read_text(encoding="utf-8"), name), encoding="utf-8")
    FOLDER.mkdir(parents=True, exist_ok=True)
    written = pages()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in FOLDER.glob("*.md"):
        if path.name not in written:
            path.unlink()
    print(f"wrote {LAYOUT.relative_to(ROOT)} and {len(written)} pages to {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
