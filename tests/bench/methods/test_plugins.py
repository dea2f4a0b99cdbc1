"""Methods and tasks of the user's own: the recipe runs, failures stay small, nothing is run unasked."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from arkv import CacheConfig, TriStateCache
from bench.cli import main
from bench.engine.engine import Engine, Measurement
from bench.errors import UserError
from bench.extend import Budget, Method, Prompt, keep_tokens
from bench.methods import plugins
from bench.methods.grid import OwnMethod, grid
from bench.methods.plugins import Plugins
from bench.names import SAMPLES
from bench.runs.run import Outcome, execute
from bench.settings.presets import load_preset
from bench.settings.run import RunConfig
from tasks.base import Document, Generate
from tests.bench.conftest import SENTENCES, read_lines
from tests.bench.lines import recorded
from tests.conftest import ROOT

PAGE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RUN: dict[str, Any] = {
    "quant_type": ("full", "mix", "attended"),
    "tasks": ("fidelity", "phone-book"),
    "cache_ratio": (0.25,),
    "budget_unit": "bytes",
    "window_size": (8,),
    "lengths": (200,),
    "samples": 2,
    "limit": 2,
    "continuation": 4,
    "max_length": 700,
    "device": "cpu",
    "dtype": "float32",
}


def go(folder: Path, path: Path, *files: Path, fresh: bool = False, **settings: Any) -> tuple[Outcome, str]:
    """A run with plugins, and what it said."""
    console = Console(file=io.StringIO(), width=200)
    text = write(path.parent / "text.txt", " ".join(SENTENCES * 10))
    given = {"model": (str(folder),), "plugin": tuple(map(str, files)), "text": text}
    config = RunConfig(**{**RUN, **given, **settings})
    return execute(config, path, console, fresh=fresh), console.file.getvalue()  # type: ignore[attr-defined]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.bench.conftest import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=1024)


def test_the_recipe_runs(long_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "my_cache.py", EXAMPLE)
    outcome, _ = go(long_folder, tmp_path / "run", file)
    assert outcome.failures == []
    rows = {(row.task, row.metric, row.method): row for row in outcome.rows}
    assert {task for task, _, _ in rows} == {"fidelity", "phone-book"}
    mine = rows["fidelity", "kl", "attended"]
    assert mine.score > 0
    # The prompt's quarter, and the four tokens that came on top of it, all of them counted.
    assert mine.kv_share == pytest.approx((49 + 4) / (199 + 4), rel=1e-3)
    assert mine.evicted_share == pytest.approx(150 / 203, rel=1e-3)
    # The full cache's divergence from itself says nothing: methods are compared with each other.
    assert mine.difference is None
    assert rows["phone-book", "exact_match", "attended"].n == 2
    assert set(recorded(tmp_path / "run")["fingerprint"]["plugins"]) == {"my_cache.py"}
    # The same command measures nothing twice.
    assert go(long_folder, tmp_path / "run", file)[0].measured == 0


def test_an_edited_plugin_needs_another_folder(long_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", EXAMPLE)
    go(long_folder, tmp_path / "run", file, tasks=("fidelity",))
    # Another plugin beside it, or none at all, changes nothing that is there.
    other = write(tmp_path / "other.py", EXAMPLE.replace("attended", "other").replace("phone-book", "book"))
    assert go(long_folder, tmp_path / "run", file, other, tasks=("fidelity",))[0].measured == 0
    assert go(long_folder, tmp_path / "run", tasks=("fidelity",), quant_type=("full", "mix"))[0].measured == 0
    write(file, EXAMPLE + "\n")
    with pytest.raises(
        UserError, match=r"other settings: plugins mine\.py is [0-9a-f]{12}\.\.\. there and [0-9a-f]{12}"
    ):
        go(long_folder, tmp_path / "run", file, tasks=("fidelity",))


NAMED = "from bench.extend import Method\nclass M(Method):\n  name = {!r}\n  compress = print"


def test_the_text_that_was_hashed_is_what_runs(tmp_path: Path) -> None:
    """Also after an edit that leaves size and time as they were."""
    file = write(tmp_path / "mine.py", NAMED.format("one"))
    stamp = file.stat().st_mtime_ns
    assert set(Plugins([file]).methods) == {"one"}
    write(file, NAMED.format("two"))
    os.utime(file, ns=(stamp, stamp))
    assert set(Plugins([file]).methods) == {"two"}


def test_a_bare_name_is_that_of_a_library_s_method_unless_it_is_one_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["mix", "snapkv", "adakv[alpha_safeguard=0.3]+knorm", "quanto-int4", "kvpress:tova"]
    found = ["mix", "kvpress:snapkv", "kvpress:adakv[alpha_safeguard=0.3]+knorm", "hf:quanto-int4", "kvpress:tova"]
    assert Plugins().usable_methods(asked) == found
    assert capsys.readouterr().err.splitlines()[0] == "snapkv is taken as kvpress:snapkv"
    mine = Plugins([write(tmp_path / "mine.py", NAMED.format("snapkv"))])
    assert mine.usable_methods(["snapkv", "tova"]) == ["snapkv", "kvpress:tova"]
    assert capsys.readouterr().err.splitlines() == ["tova is taken as kvpress:tova"]


def test_a_method_is_pickled_with_the_text_of_its_file(tmp_path: Path) -> None:
    """As a worker gets it, which has neither the module nor the file."""
    file = write(tmp_path / "own.py", NAMED.format("own"))
    method = Plugins([file]).methods["own"].method
    method.seen = 3  # type: ignore[attr-defined]
    pickled = pickle.dumps(method)
    module = sys.modules.pop(type(method).__module__)
    file.unlink()
    again = pickle.loads(pickled)
    assert (again.name, again.seen) == ("own", 3)
    assert type(again).__module__ == module.__name__ in sys.modules
    sys.modules[module.__name__] = module
    assert type(pickle.loads(pickled)) is type(method), "run once in each process"


def test_a_plugin_that_raises_stops_nothing_else(long_folder: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.py", EXAMPLE)
    for body, said in (
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("def (", "SyntaxError: "),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "defines no method and no task"),
        (NAMED.format("mix"), "another method named 'mix'"),
        (NAMED.format("a:b"), "no colon, comma or"),
    ):
        broken = write(tmp_path / "broken.py", body)
        found = Plugins([broken, good])
        assert [failure["plugin"] for failure in found.failures] == ["broken.py"]
        assert said in found.failures[0]["error"]
        assert "\n" not in found.failures[0]["error"]
        assert set(found.methods) == {"attended"}
    methods, tasks = ("full", "attended", "theirs"), ("fidelity", "their-task")
    outcome, said = go(long_folder, tmp_path / "run", broken, good, quant_type=methods, tasks=tasks)
    assert {row.method for row in outcome.rows} == {"full", "attended"}
    assert [failure["plugin"] for failure in outcome.failures] == ["broken.py"] * 3
    assert "plugin broken.py: unknown method 'theirs', which it may have had" in said
    assert recorded(tmp_path / "run")["failures"] == outcome.failures
    with pytest.raises(UserError, match=r"plugin broken\.py: .*no colon"):
        go(long_folder, tmp_path / "other", broken, quant_type=("theirs",))
    assert not (tmp_path / "other").exists()


def test_unknown_names_are_errors_where_no_plugin_failed(long_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "my_cache.py", EXAMPLE)
    with pytest.raises(UserError, match="unknown method 'atended': did you mean attended"):
        go(long_folder, tmp_path / "run", file, quant_type=("atended",))
    with pytest.raises(ValueError, match="unknown task 'phone-bok': did you mean phone-book"):
        go(long_folder, tmp_path / "run", file, tasks=("phone-bok",))
    with pytest.raises(UserError, match=r"--plugin=nowhere\.py: no such file"):
        go(long_folder, tmp_path / "run", Path("nowhere.py"))
    with pytest.raises(UserError, match=r"no setting 'plugin': .*only --plugin sets it"):
        load_preset(str(write(tmp_path / "preset.yaml", "plugin: my_cache.py")))
    assert not (tmp_path / "run").exists()


def test_the_option_is_repeated_or_names_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.py", EXAMPLE)
    two = write(tmp_path / "two.py", EXAMPLE.replace("attended", "other").replace("phone-book", "book"))
    broken = write(tmp_path / "broken.py", "1 / 0")
    with pytest.raises(SystemExit) as ended:
        main(["list", "methods", "--plugin", f"{one},{two}", "--plugin", str(broken)])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert re.search(r"^attended +the newest 16 tokens", said.out, re.MULTILINE)
    assert re.search(r"^other +", said.out, re.MULTILINE)
    assert said.err == "arkv-bench: plugin broken.py: ZeroDivisionError: division by zero\n"
    with pytest.raises(SystemExit) as ended:
        main(["run", "--plugin", str(one), "--plugin", str(two), "--print-config"])
    assert ended.value.code == 0
    assert re.search(rf"^plugin +\['{one}', '{two}'\] +flag$", capsys.readouterr().out, re.MULTILINE)


FAILING = """
import torch
from bench.extend import KeptLayer, Method, keep_tokens
from tasks.base import Document, Generate, Metric, Task
from transformers.cache_utils import Cache


class Base(Method):
    def compress(self, model, prompt, budget):
        return keep_tokens(prompt, [torch.arange(budget.tokens) for _ in prompt.layers])


class Raises(Base):
    name = "raises"

    def compress(self, model, prompt, budget):
        return {}["no\\nsuch key"]


class Hungry(Base):
    name = "hungry"

    def compress(self, model, prompt, budget):
        return torch.empty(1 << 56)


class Miscounted(Base):
    name = "miscounted"

    def token_counts(self, cache):
        return {"kept": 3}


class Late(Base):
    name = "late"

    def decoding(self, model, cache):
        cache.update = None
        return super().decoding(model, cache)


class Forgetful(Base):
    name = "forgetful"

    def compress(self, model, prompt, budget):
        layers = super().compress(model, prompt, budget).layers
        return Cache(layers=[KeptLayer(layer.keys, layer.values, budget.tokens) for layer in layers])


class Infinite(Base):
    name = "infinite"

    def compress(self, model, prompt, budget):
        cache = super().compress(model, prompt, budget)
        cache.layers[0].values = cache.layers[0].values * torch.nan
        return cache


class Pedantic(Task):
    name = "pedantic"
    metrics = (Metric(name="score"),)

    def load(self, settings):
        return [Document(id="one", request=Generate(prompt_ids=(1,) * 40, max_new_tokens=2))]

    def score(self, document, answer):
        raise IndexError("nothing is good enough")
"""


def test_what_fails_in_a_prompt_is_recorded_and_the_rest_goes_on(long_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "failing.py", FAILING)
    methods = ("full", "raises", "hungry", "miscounted", "late", "forgetful", "infinite", "mix")
    outcome, _ = go(long_folder, tmp_path / "run", file, quant_type=methods, tasks=("fidelity", "pedantic"))
    assert {row.method for row in outcome.rows} == {"full", "mix"}
    said = {
        failure["cell"].partition("-")[0]: failure["error"]
        for failure in outcome.failures
        if "cell" in failure and failure["task"] == "fidelity"
    }

    def number(text: str) -> int:
        return FAILING[: FAILING.index(text)].count("\n") + 1

    assert said["raises"] == f"raises: KeyError: 'no\\nsuch key' (failing.py, line {number('return {}[')})"
    assert said["hungry"].startswith("hungry: RuntimeError: ")
    assert "allocate" in said["hungry"]
    assert said["miscounted"].startswith("miscounted: KeyError: 'original' (")
    assert said["late"].startswith("late: TypeError: ")
    assert "a prompt of 199 tokens says that it has seen 49" in said["forgetful"]
    assert said["infinite"] == "the answer holds numbers that are not finite"
    where = f"failing.py, line {number('raise IndexError')}"
    assert f"pedantic: IndexError: nothing is good enough ({where})" in {item["error"] for item in outcome.failures}
    assert len(read_lines(tmp_path / "run" / SAMPLES)) == 2 * 2


def test_installed_entry_points_load_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "my_installed.py", EXAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = EntryPoints(
        [
            EntryPoint("attended", "my_installed:Attended", plugins.METHODS),
            EntryPoint("gone", "my_missing:Gone", plugins.METHODS),
            EntryPoint("renamed", "my_installed:Attended", plugins.METHODS),
            EntryPoint("phone-book", "my_installed:PhoneBook", plugins.TASKS),
        ]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: points.select(**wanted))
    found = Plugins()
    assert found.usable_methods(["full", "mix"]) == ["full", "mix"]
    assert found.names() == {"phone-book"}
    assert "my_installed" not in sys.modules
    assert found.usable_methods(["attended", "mix"]) == ["attended", "mix"]
    assert set(found.methods) == {"attended"}
    task = found.get("phone-book")
    assert task is not None
    assert task.name == "phone-book"
    assert found.get("needle") is None
    assert found.usable_methods(["full", "gone"]) == ["full"]
    assert found.failures[0] == {
        "plugin": "my_missing:Gone",
        "error": "ModuleNotFoundError: No module named 'my_missing'",
    }
    found = Plugins()
    found.load_installed(plugins.METHODS)
    assert set(found.methods) == {"attended"}
    assert "leads to a class with the name 'attended'" in found.failures[1]["error"]
    sys.modules.pop("my_installed")


def test_an_entry_point_with_a_name_that_is_taken(
    long_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by name and never imported; the name means what it means without the package."""
    names = (("gsm8k", plugins.TASKS), ("needle", plugins.TASKS), ("mix", plugins.METHODS))
    points = EntryPoints([EntryPoint(name, "my_missing:Evil", group) for name, group in names])
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: points.select(**wanted))
    asked = {"tasks": ("needle", "gsm8k"), "quant_type": ("full", "mix"), "samples": 1, "question": "before"}
    outcome, _ = go(long_folder, tmp_path / "run", data_dir=tmp_path, **asked)
    refused = [item["error"] for item in outcome.failures if item.get("plugin") == "my_missing:Evil"]
    assert [error.partition(", and is not used")[0] for error in refused] == [
        "its method 'mix' has the name of one of this suite",
        "its task 'needle' has the name of one of this suite",
        "its task 'gsm8k' has the name of one of lm-eval",
    ]
    assert {(row.task, row.method) for row in outcome.rows} == {("needle", "full"), ("needle", "mix")}
    assert "no local rows" in outcome.failures[-1]["error"]


class Same(Method):
    """The tri-state cache under another name, or everything."""

    name = "same"
    has_budget = False
    config: CacheConfig | None = None

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def compress(self, model: Any, prompt: Prompt, budget: Budget) -> Any:
        self.drawn.append(float(torch.rand(())))
        assert (budget.tokens, prompt.layers[0].queries.shape[2]) == (prompt.tokens, 32)
        if self.config is not None:
            return TriStateCache.from_prefill(prompt.cache, self.config)
        return keep_tokens(prompt, [torch.arange(prompt.tokens).flip(0) for _ in prompt.layers])


@pytest.mark.parametrize("method", ["full", "mix"])
def test_a_method_that_does_the_same_answers_the_same(tiny: Any, method: str) -> None:
    """Through the interface, everything kept is the full cache, and the tri-state cache is itself."""
    config = CacheConfig.for_method("mix", cache_size=64) if method == "mix" else None
    own = Same()
    own.config = config
    budgets = [{"cache_size": 64}, {"cache_size": 32}] if method == "full" else [{"cache_size": 64}]
    cells = grid([method, "same"], budgets, [32], None, {}, {"same": OwnMethod(own, "1")})
    assert len(cells) == 2
    ids = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    document = Document(id="d", request=Generate(prompt_ids=tuple(ids), max_new_tokens=6))
    state = torch.get_rng_state()
    engine = Engine(tiny.model, tiny.tokenizer, cells)
    theirs, mine = engine.answer(document, cells)
    list(engine.answer(document, cells))
    assert own.drawn[0] == own.drawn[1], "numbers are drawn the same way for the same prompt"
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(theirs, Measurement)
    assert isinstance(mine, Measurement)
    assert mine.answer == theirs.answer
    assert (mine.kv_bytes, mine.tokens_evicted) == (theirs.kv_bytes, theirs.tokens_evicted)


def test_each_kv_head_keeps_its_own_tokens(tiny: Any) -> None:
    from arkv import PrefillCache, attach

    ids = torch.randint(0, 300, (1, 50), generator=torch.Generator().manual_seed(0))
    cache = PrefillCache(tiny.model)
    with attach(tiny.model), torch.inference_mode():
        tiny.model(ids, past_key_values=cache)
    prompt = Prompt(ids=ids, cache=cache)
    kept = keep_tokens(prompt, [torch.tensor([[3, 1], [7, 49]])] * 2)
    keys = prompt.layers[1].keys
    assert keys is not None
    assert torch.equal(kept.layers[1].keys, torch.stack([keys[:, 0, [1, 3]], keys[:, 1, [7, 49]]], dim=1))
    assert kept.get_seq_length() == 50
    for wrong, said in (([torch.tensor([1, 1])] * 2, "kept twice"), ([torch.tensor([1])], "indices for 1 layers")):
        with pytest.raises(ValueError, match=said):
            keep_tokens(prompt, wrong)


def test_contributing_leads_to_the_recipe() -> None:
    assert "(docs/plugins.md)" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
