"""What the documentation says can be typed: every command in it is run here, or at least understood as typed."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from PIL import Image

from bench.cli import app, main
from bench.settings.presets import resolve
from bench.settings.run import FIELDS
from scripts.figures_in_docs import PAGES as NUMBERED
from scripts.figures_in_docs import claims, evidence, with_numbers
from scripts.figures_in_docs.common import RESULTS
from scripts.figures_in_docs.pictures import PICTURES, SAYS, drawing
from tests.bench.conftest import save_tiny_model
from tests.bench.runs.test_run import go

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GROUP: Any = typer.main.get_command(app)
OFFLINE = {"needle", "fidelity"}
"""Tasks that the tiny model can be asked without any rows."""


def commands(text: str) -> Iterator[str]:
    """Lines of the bash blocks, without comments; of scripts those of the suite; and the steps of workflows."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("arkv-bench ") or not block.startswith("#!"):
                yield from filter(None, [shlex.join(shlex.split(line, comments=True))])
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for content in yaml.safe_load_all(block):
            for job in content.get("jobs", {}).values():
                yield from (step["run"] for step in job["steps"] if "run" in step)


TYPED = sorted({line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))})
SUITE = [line for line in TYPED if line.startswith("arkv-bench ")]


def words(line: str) -> list[str]:
    return shlex.split(line)[1:]


def settings(line: str) -> dict[str, Any]:
    """The options of a ``run`` as typed. Raises what the command line would say."""
    command = GROUP.commands["run"]
    with command.make_context("run", words(line)[1:], parent=click.Context(GROUP)) as context:
        return dict(context.params)


def test_commands_are_found() -> None:
    assert len(SUITE) > 25
    assert {words(line)[0] for line in SUITE} >= {*GROUP.commands}, "a command that no page shows"


@pytest.mark.parametrize("line", SUITE)
def test_options_are_those_of_the_command(line: str) -> None:
    name, *arguments = words(line)
    if name.startswith("-"):
        assert name in {option for item in GROUP.params for option in item.opts}
        return
    if arguments == ["--help"]:
        assert name in GROUP.commands
        return
    with GROUP.commands[name].make_context(name, arguments, parent=click.Context(GROUP)):
        pass


def is_run(line: str) -> bool:
    return words(line)[0] == "run" and "--help" not in line


@pytest.mark.parametrize("line", [line for line in SUITE if is_run(line)])
def test_settings_of_runs_make_sense(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    typed = settings(line)
    flags = {name: value for name, value in typed.items() if name in FIELDS and value}
    assert resolve(flags, typed["preset"])[0].tasks


def write_files(folder: Path) -> None:
    """The files that the tutorial has the reader write, and the preset that a search leaves."""
    found = folder / "runs" / "tuned" / "preset.yaml"
    found.parent.mkdir(parents=True)
    found.write_text("cache_size: [512]\n")
    for block in re.findall(r"```yaml\n# (\S+)\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL):
        path = folder / block[0]
        path.parent.mkdir(exist_ok=True)
        path.write_text(block[1])
    rows = folder / "my_data" / "animals" / "test.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text('{"question": "What barks?", "answer": "A dog"}\n' * 3)
    (folder / "manual.txt").write_text("Press the button once and wait until the lamp is green. " * 100)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "finished"
    go(tiny_folder, path, samples=2, quant_type=("full", "mix"))
    return path


def marked(line: str) -> Any:
    """Drawing takes time."""
    return pytest.param(line, marks=pytest.mark.slow) if "--html" in line or "--figures" in line else line


@pytest.mark.parametrize(
    "line",
    [
        marked(line)
        for line in SUITE
        if words(line)[0] in ("list", "report", "check") and "--help" not in line and "published.csv" not in line
    ],
)
def test_what_reads_a_run_does_its_work(
    line: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On runs of a tiny model under the names that the page gives them."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"(?:runs|results)/\w+", line) or ["runs/newest"]:
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        if "--update" not in line or target.parent.name == "runs":
            target.symlink_to(finished)
    with pytest.raises(SystemExit) as ended:
        main(words(line))
    assert not ended.value.code
    for name in re.findall(r"(?:--html|--latex|--markdown|-o|--figures|--update --against) (\S+)", line):
        assert (tmp_path / name).exists() or "--format" in line


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in SUITE if is_run(line)])
def test_runs_run(line: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model, short prompts and few documents in the place of what the page names."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    preset = settings(line)["preset"]
    typed = settings(line)["tasks"] or (resolve({}, preset)[0].tasks if preset else "needle")
    asked = set(typed.split(",") if isinstance(typed, str) else typed)
    if "--executor" in line:
        pytest.skip("needs a cluster")
    if not asked <= OFFLINE | {"animals"}:
        pytest.skip(f"{', '.join(sorted(asked - OFFLINE))}: needs rows that do not come with the suite")
    small = ["--lengths", "300", "--samples", "1", "--continuation", "4", "--limit", "1", "--dtype", "float32"]
    budget = [] if "cache-ratio" in line or preset else ["--cache-size", "64", "--window-size", "8"]
    with pytest.raises(SystemExit) as ended:
        main([*words(line), *small, *budget, "--device", "cpu", "--model", str(tiny_folder), "--outdir", "out"])
    assert not ended.value.code


@pytest.mark.parametrize("line", [line for line in TYPED if not line.startswith("arkv-bench ")])
def test_other_lines_name_what_is_there(line: str) -> None:
    first, *rest = shlex.split(line)
    if first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif first.startswith((".", "scripts/")):
        assert (ROOT / first).is_file()
    else:
        assert first in ("source", "pip", "cd"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve()
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_written_pages_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "commands").glob("*.md")}
    assert written == module.pages(), "run make docs"
    assert (ROOT / "docs" / "layout.md").read_text(encoding="utf-8") == module.layout(), "run make docs"
    tasks = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert tasks == module.with_settings(tasks), "run make docs"


@pytest.mark.parametrize("name", NUMBERED)
def test_numbers_are_those_of_the_results(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert page == with_numbers(page, name), "run make docs"
    for block in NUMBERED[name]:
        with pytest.raises(SystemExit, match=f"{name} has no place for the numbers called {block}"):
            with_numbers(page.replace(f"make docs: {block} -->", "make docs: show -->"), name)


def test_a_number_that_was_edited_is_written_anew() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    edited = re.sub(r"\d+ /", "7 /", readme, count=1)
    assert edited != readme
    assert with_numbers(edited, "README.md") == readme


def test_an_unknown_score_of_a_record_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / evidence.LONGBENCH
    shutil.copytree(RESULTS / evidence.LONGBENCH, folder)
    first, rest = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n", 1)
    sample = json.loads(first)
    sample["scores"] = dict.fromkeys(sample["scores"])
    (folder / "samples.jsonl").write_text(f"{json.dumps(sample)}\n{rest}", encoding="utf-8")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=f"score of {sample['document']} with {sample['method']}"):
        evidence.longbench()


def test_a_sentence_that_records_contradict_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PUBLISHED", 10)
    with pytest.raises(SystemExit, match="the published 10 tokens hold such prompts whole"):
        claims.claims()


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_show_the_rows_of_the_records(path: Path) -> None:
    rows = PICTURES[path]()
    figure, said = drawing(rows)
    with Image.open(path) as picture:
        assert picture.text[SAYS] == said, "run make docs"
    with Image.open(io.BytesIO(figure.encoded("png", {SAYS: said}))) as again:
        assert again.text == {SAYS: said}
    assert said.count("\n") == len(rows), "every row is a point"


def test_the_caption_on_top_is_of_the_rows_of_its_picture() -> None:
    block = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("make docs: exam figure -->")[2].partition("<!--")[0]
    )
    (path,) = re.findall(r"\]\((\S+\.png)\)", block)
    with Image.open(ROOT / path) as picture:
        shown, *points = picture.text[SAYS].splitlines()
    task, documents = shown.split(", ")
    assert f"`{task.partition(':')[2]}`, {documents}" in " ".join(block.split())
    share, said = re.findall(r"; in (\S+ %) of the bytes: (.*)\]\(", block)[0]
    for item in said.split(", "):
        method, score = item.split()
        assert any(re.match(rf"{method}( \S+)? {share}: string_match {score}\b", point) for point in points), item


def test_the_table_on_top_fits_a_terminal() -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("make docs: exam -->")[2].partition("<!--")[0]
    table = [line for line in block.splitlines() if line.startswith("|")]
    assert len(table) > 5
    assert len({len(line) for line in table}) == 1, "its columns stand under each other"
    assert len(table[0]) <= 100


def test_the_workflows_run_what_ci_runs() -> None:
    jobs = {
        file.stem: yaml.safe_load(file.read_text())["jobs"] for file in (ROOT / ".github" / "workflows").glob("*.yml")
    }

    def steps(name: str) -> list[str]:
        return [step["run"] for job in jobs[name].values() for step in job["steps"] if "run" in step]

    assert steps("nightly") == [".ci/run"]
    assert "make check" in steps("test")
    assert jobs["test"]["fast"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
