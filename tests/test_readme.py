"""What the README promises is true: its example runs, its layout is the tree, its names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_example(code: str, model: Any, inputs: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"model": model, "inputs": inputs}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from bench.models.loading import load

    folder = save_tiny_model(tmp_path_factory.mktemp("readme") / "tiny", context=1024)
    return load(str(folder), dtype="float32", device="cpu")


def test_the_library_is_five_lines() -> None:
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) == 5


def test_the_example_runs_and_leaves_the_model_alone(loaded: Any) -> None:
    inputs = loaded.tokenizer("The old farmer bought a basket of apples. " * 60, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length > 512, "too short to compress anything"
    before = loaded.model.config._attn_implementation
    names = run_example(EXAMPLES[0], loaded.model, {"input_ids": inputs["input_ids"]})
    assert names["output"].shape[1] > length
    counts = names["cache"].token_counts()
    assert counts["original"] + counts["quantized"] == pytest.approx(512)
    assert counts["quantized"] > 0
    assert counts["evicted"] > 0
    assert loaded.model.config._attn_implementation == before


def test_the_examples_of_the_library_are_those_of_its_page(loaded: Any) -> None:
    whole, in_bytes, twice = re.findall(r"```python\n(.*?)```", LIBRARY, re.DOTALL)
    assert whole == EXAMPLES[0]
    names: dict[str, Any] = {}
    exec("from arkv import CacheConfig\n" + in_bytes, names)
    assert (names["config"].budget_unit, names["config"].cache_ratio) == ("bytes", 0.25)
    inputs = loaded.tokenizer("The old farmer bought a basket of apples. " * 60, return_tensors="pt")
    asked = "from arkv import CacheConfig\nquestions = [inputs['input_ids'][:, :5]]\n"
    names = run_example(asked + twice, loaded.model, inputs)
    assert names["output"].shape[1] > names["whole"].shape[1]
    assert names["cache"].nbytes() < 0.13 * names["prefill"].nbytes()


@pytest.mark.slow
def test_the_example_runs_on_the_default_model() -> None:
    from bench.models.loading import load
    from tasks.base import TaskSettings
    from tasks.registry import get_task

    real = load("smollm2-135m")
    settings = TaskSettings(tokenizer=real.tokenizer, max_length=8192, limit=2, options={"lengths": (1000,)})
    (document, _) = get_task("needle").load(settings)
    import torch

    ids = torch.tensor([document.request.prompt_ids])
    names = run_example(EXAMPLES[0], real.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert names["cache"].token_counts()["evicted"] > 400
    assert names["output"].shape[1] > ids.shape[1]


def test_the_layout_is_the_tree() -> None:
    layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8").split("| file |")[0]
    lines = dict(re.findall(r"^\| (\S+/) \| (.*) \|$", layout, re.MULTILINE))
    assert all(lines.values())
    folders = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for folder in ("arkv", "bench", "tasks", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert set(lines) == folders


def test_every_method_stands_in_the_table() -> None:
    from bench.names import DESCRIPTIONS

    assert re.findall(r"^\| `(\w[\w-]*)` \|", README.split("## The methods")[1], re.MULTILINE) == list(DESCRIPTIONS)


def test_commands_and_options_named_here_exist() -> None:
    import typer.main

    from bench.cli import app

    group: Any = typer.main.get_command(app)
    commands = group.commands
    for name in re.findall(r"arkv-bench ([a-z]+)", README):
        assert name in commands
    options = {"--help"} | {
        option
        for command in (group, *commands.values())
        for item in command.params
        for option in (*item.opts, *item.secondary_opts)
    }
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README):
        assert option in options, option


def test_it_is_of_a_page() -> None:
    assert len(README.splitlines()) <= 130


def test_files_linked_here_exist() -> None:
    for target in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / target).is_file(), target
