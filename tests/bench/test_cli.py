"""The command line as a shell sees it: help at once, every mistake answered in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_group

from bench import errors
from bench.cli import app, main, traceback_first, with_dashes
from bench.commands.first_look import check_paths
from bench.settings.run import RunConfig
from tasks.fidelity import SENTENCES
from tests.bench.conftest import quiet_environment

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [command.name for command in app.registered_commands]


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=quiet_environment(),
    )


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must fail: exit code and the one line that it says."""

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return int(caught.value.code or 0), said

    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command that must succeed prints, without the frames of its help."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert not caught.value.code
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help(say: Any, command: str) -> None:
    assert "Usage: " in say(command, "--help")


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_whole_in_a_narrow_help(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that is cut cannot be typed."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert not caught.value.code
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    of_command = get_group(app).commands[command]
    words = {word.strip(",") for word in text.split()}
    for item in of_command.params:
        names = [*item.opts, *item.secondary_opts] if item.param_type_name == "option" else [item.metavar]
        assert set(names) <= words
        # What takes a value says which.
        assert item.metavar or getattr(item, "is_flag", False)


def test_only_examples_keep_their_lines_in_a_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (first,) = [line for line in lines if line.startswith("Print the answer")]
    assert first.endswith("in bold.")
    assert "arkv-bench report runs/demo" in lines


def test_the_help_of_all_names_every_command_and_exit_code() -> None:
    done = shell("--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert [command for command in COMMANDS if f" {command} " not in text] == []
    for said in ("0 done", "1 something failed", "2 usage error", "130 stopped by Ctrl-C"):
        assert said in text


def test_help_imports_nothing_heavy() -> None:
    """Modules that take time to import: whatever --help needs beyond typer and rich would be felt."""
    code = """
import sys, bench.cli
try:
    bench.cli.main(["--help"])
except SystemExit:
    heavy = "torch transformers lm_eval pandas numpy scipy datasets yaml jinja2 matplotlib optuna"
    print([name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_shells_are_completed(name: str) -> None:
    """As the shell asks: through environment variables, with what has been typed so far."""
    asked = (
        {"COMP_WORDS": "arkv-bench re", "COMP_CWORD": "1"}
        if name == "bash"
        else {"_TYPER_COMPLETE_ARGS": "arkv-bench re"}
    )
    asked |= {"_ARKV_BENCH_COMPLETE": f"complete_{name}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "import sys; sys.argv[0] = 'arkv-bench'; from bench.cli import main; main([])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=quiet_environment(**asked),
    )
    assert "report" in done.stdout
    assert "doctor" not in done.stdout


def test_defaults_stand_in_the_help(say: Any) -> None:
    text = say("run", "--help")
    for said in (
        "Default: smollm2-135m",
        "Default: needle",
        "Default: full,window,origin,quant,mix",
        "Default: 0.25,0.125, unless",
        "Default: 32",
    ):
        assert said in text


def test_underscores_in_names_not_in_values() -> None:
    assert with_dashes(["run", "--quant_type=a_b", "--data_dir", "x_y", "--", "--z_z"]) == [
        *["run", "--quant-type=a_b", "--data-dir", "x_y", "--", "--z_z"]
    ]


def test_underscore_spellings_reach_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--quant_type", "mix", "--cache_size=64", "--window_size", "8", "--print_config"])
    assert caught.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["methods", "['mix']", "flag"] in lines
    assert ["cache_size", "[64]", "flag"] in lines
    assert ["seed", "0", "default"] in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quant-type", "full,mxi"], "unknown method 'mxi': did you mean mix"),
        (["--tasks", "needel"], "unknown task 'needel': did you mean needle"),
        (["--tasks", "gsm8"], "unknown task 'gsm8': did you mean"),
        (["--tasks", "needel,gsm8"], "'needel': did you mean needle or winogender_all?; unknown task 'gsm8': did"),
        (["--quant-format", "fp9"], "unknown quant format 'fp9': did you mean fp8"),
        (["--model", "smollm-135m"], "smollm2-135m"),
        (["--preset", "dmeo"], "unknown preset 'dmeo': did you mean demo"),
        (["--window-size", "64", "--cache-size", "64"], "window_size=64 is not smaller than cache_size=64"),
        (["--cache-size", "-5"], "--cache-size=-5: give 2 or more"),
        (["--cache-size", "many"], "'many' is not a whole number"),
        (["--cache-ratio", "2"], "--cache-ratio=2.0"),
        (["--tau1", "-1", "--quant-type", "mix"], "tau1=-1.0"),
        (["--limit", "0"], "--limit=0"),
        (["--samples", "2.9"], "--samples: '2.9' is not a whole number"),
        (["--gamma", "much"], "--gamma: 'much' is not a number"),
        (["--no-full", "--methods", "full"], "--no-full leaves no method"),
        (["--batch-size", "0"], "--batch-size=0"),
        (["--batch-size", "many"], "--batch-size=many"),
        (["--rolling-prefill", "1"], "--rolling-prefill=1.0"),
        (["--rolling-chunk", "0"], "--rolling-chunk=0"),
        (["--include-path", "nowhere", "--tasks", "toy"], "include_path: nowhere is not a folder"),
        (["--sampling-ratio", "0"], "--sampling-ratio=0"),
    ],
)
def test_questions_that_make_no_sense(fail: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, line = fail("run", "--outdir", tmp_path / "run", *arguments)
    assert code == 2
    assert said in line
    assert len(line.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_unknown_options_and_commands(fail: Any) -> None:
    assert fail("run", "--quant-typ", "mix")[0] == 2
    assert fail("rum")[0] == 2
    assert fail("list", "method")[0] == 2


@pytest.fixture
def tiny_run(tiny_folder: Path, tmp_path: Path) -> list[object]:
    few = ["--lengths", "250", "--samples", "1", "--quant-type", "full,mix", "--cache-size", "64", "--device", "cpu"]
    return ["run", "--model", tiny_folder, *few, "--quant-format", "int8", "--outdir", tmp_path / "run"]


def empty(path: Path) -> None:
    path.write_text("")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xfa")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "said", "status"),
    [
        (empty, "is empty", 1),
        (binary, "not UTF-8", 1),
        (folder, "cannot read", 1),
        (lambda path: None, "no such file", 2),
    ],
)
def test_data_files_that_cannot_be_used(
    fail: Any, tiny_run: list[object], tmp_path: Path, make: Any, said: str, status: int
) -> None:
    file = tmp_path / "haystack.txt"
    make(file)
    code, text = fail(*tiny_run, "--haystack", file)
    assert code == status
    assert said in text
    assert str(file) in text


def test_sentences_are_no_file_to_look_for() -> None:
    check_paths(RunConfig(text=SENTENCES))


def test_missing_data_dir(fail: Any, tiny_run: list[object], tmp_path: Path) -> None:
    code, text = fail(*tiny_run, "--tasks", "gsm8k", "--data-dir", tmp_path / "nowhere")
    assert code == 2
    assert text == f"arkv-bench: --data-dir={tmp_path / 'nowhere'}: no such folder\n"


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--data-dir", "nowhere"],
        ["plan", "--no-calibrate", "--text", "nowhere"],
        ["tune", "--data-dir", "nowhere"],
        ["inspect", "--task", "needle", "--data-dir", "nowhere"],
        ["inspect", "--text", "nowhere"],
        ["report", str(ROOT / "results" / "demo"), "--against", "nowhere"],
    ],
)
def test_a_file_that_is_not_there_is_a_usage_error_everywhere(fail: Any, tiny_folder: Path, command: list[str]) -> None:
    model = [] if command[0] == "report" else ["--model", tiny_folder]
    code, text = fail(*command, *model)
    assert (code, len(text.splitlines())) == (2, 1)
    assert "nowhere" in text


def test_an_unknown_task_among_others(fail: Any, tiny_run: list[object], tmp_path: Path) -> None:
    code, text = fail(*tiny_run, "--tasks", "needel,needle")
    assert code == 1
    assert text.splitlines()[1:] == ["  needel: unknown task 'needel': did you mean needle or winogender_all?"]
    assert (tmp_path / "run/results.csv").is_file()
    planned = [*tiny_run[1:-2], "--no-calibrate", "--tasks", "needel,needle"]
    assert fail("plan", *planned) == (1, "")


def test_a_whole_run_and_its_report(tiny_run: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in tiny_run])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.index("The answer") < said.index("needle (question after), exact_match")
    for arguments in (["--format", "markdown"], ["--format", "csv"], ["-o", str(tmp_path / "table.md")]):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(tmp_path / "run"), *arguments])
        assert caught.value.code == 0
    assert "| budget | method |" in (tmp_path / "table.md").read_text()


def test_a_run_ends_with_where_it_is_and_what_to_type_next(
    tiny_run: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, tiny_run), "--tasks", "needle,mmlu", "--data-dir", str(tmp_path)])
    assert caught.value.code == 1
    said = capsys.readouterr()
    first, missing = said.err.splitlines()
    assert first == "arkv-bench: not everything could be measured:"
    assert missing.startswith(f"  57 tasks of tiny: no rows in --data-dir {tmp_path}: mmlu_")
    assert said.out.count("no rows in") == 1
    assert said.out.splitlines()[-4:] == [
        f"Run folder: {tmp_path / 'run'}",
        f"What failed is tried again by the same command with --outdir {tmp_path / 'run'}",
        f"All metrics, p-values and notes: arkv-bench report {tmp_path / 'run'} --details",
        f"Next, a page to look at: arkv-bench report {tmp_path / 'run'} --html page.html",
    ]


def test_the_newest_run_is_taken_where_none_is_named(
    tiny_run: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fail: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (["report"], ["check", "--against", "anywhere"]):
        code, text = fail(*line)
        assert (code, len(text.splitlines())) == (2, 1)
        assert "arkv-bench run --preset demo" in text
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in tiny_run[:-2]])
    assert caught.value.code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["report"])
    assert caught.value.code == 0
    said = capsys.readouterr()
    assert said.err == f"arkv-bench: no run named, so this is the newest one, runs/{folder.name}\n"
    assert "needle (question after), exact_match" in said.out
    with pytest.raises(SystemExit) as caught:
        main(["check", "--against", str(folder), "--no-speed"])
    assert caught.value.code == 0
    assert f"runs/{folder.name}" in capsys.readouterr().err


def test_check_needs_something_to_compare_with(fail: Any, tmp_path: Path) -> None:
    code, text = fail("check", tmp_path)
    assert (code, len(text.splitlines())) == (2, 1)
    assert "give --against FOLDER" in text


@pytest.mark.parametrize("option", ["-o", "--html", "--latex"])
def test_the_folder_of_a_file_is_made(fail: Any, tiny_run: list[object], tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit):
        main([str(argument) for argument in tiny_run])
    file = tmp_path / "missing" / "x.csv"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "run"), option, str(file)])
    assert ended.value.code == 0
    assert file.stat().st_size
    code, text = fail("report", tmp_path / "run", option, file / "below")
    assert code == 1
    assert f"{file / 'below'}: cannot be written" in text.splitlines()[-1]


def test_ctrl_c_says_how_to_go_on(fail: Any, tiny_run: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.engine.engine import Engine

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "answer", stop)
    code, text = fail(*tiny_run)
    assert code == 130
    assert "the same command with --outdir" in text


@pytest.mark.parametrize(
    "command",
    [["report"], ["report", "--html", "page.html"], ["view"], ["check", "--against", "x"], ["score"], ["inspect"]],
)
def test_exit_codes_of_a_folder_that_is_not_there_agree(fail: Any, tmp_path: Path, command: list[str]) -> None:
    code, said = fail(command[0], tmp_path / "nowhere", *command[1:])
    assert (code, len(said.splitlines())) == (2, 1)
    assert f"{tmp_path / 'nowhere'} is no " in said
    assert said.strip().endswith("it does not exist")


def test_reports_of_what_is_no_run(fail: Any, tmp_path: Path) -> None:
    code, text = fail("report", tmp_path)
    assert (code, "is no run folder: it has no results.csv" in text) == (2, True)
    assert fail("report", tmp_path / "nowhere")[0] == 2
    (tmp_path / "results.csv").write_text("nonsense\n")
    assert "no column" in fail("report", tmp_path)[1]


def test_output_and_errors_that_nobody_reads() -> None:
    """As in ``arkv-bench report RUN 2>&1 | head -1``: one pipe, which is closed."""
    command = [sys.executable, "-m", "bench.cli", "report", "results/demo"]
    with subprocess.Popen(
        command, cwd=ROOT, env=quiet_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(120) == errors.NOBODY_READS


@pytest.fixture
def no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --traceback sets is set back afterwards."""
    monkeypatch.setattr(errors, "SHOW_TRACEBACK", False)


@pytest.mark.usefixtures("no_traceback")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_traceback_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path, place: int) -> None:
    line = ["report", str(tmp_path / "nowhere")]
    line.insert(place, "--traceback")
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert "read_results" in said
    assert said.splitlines()[-1].startswith("arkv-bench: ")


def test_a_traceback_by_the_environment(tmp_path: Path) -> None:
    for value, shown in (("1", True), ("0", False)):
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", "report", str(tmp_path / "nowhere")],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=quiet_environment(ARKV_TRACEBACK=value),
        )
        assert ("Traceback" in done.stderr, done.returncode) == (shown, 2)


def test_the_cause_that_a_line_hides_stands_in_the_traceback() -> None:
    def fail_hiding() -> None:
        try:
            raise KeyError("the cause")
        except KeyError:
            raise errors.UserError("the line") from None

    with pytest.raises(errors.UserError) as caught:
        fail_hiding()
    said = errors.whole_traceback(caught.value)
    assert said.index("KeyError: 'the cause'") < said.index("UserError: the line")


def test_a_word_behind_two_dashes_is_no_option() -> None:
    assert traceback_first(["report", "--", "--traceback"]) == ["report", "--", "--traceback"]


def test_a_bug_says_that_it_is_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.records.row

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr(bench.records.row, "read_results", fail)
    with pytest.raises(ZeroDivisionError):
        main(["report", "anywhere"])
    assert "this is a bug of arkv-bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("methods", ["full", "window", "origin", "quant", "mix"]),
        ("tasks", ["needle", "gsm8k"]),
        ("models", ["smollm2-135m"]),
        ("presets", ["demo"]),
    ],
)
def test_lists(what: str, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["list", what])
    assert caught.value.code == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].strip()]
    assert set(shown) <= set(first)


def test_doctor_never_breaks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--data-dir", str(tmp_path / "nowhere")])
    assert caught.value.code == 1
    text = capsys.readouterr().out
    assert "FAIL" in text
    assert "is no folder" in " ".join(text.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("arkv-bench ")


def test_the_two_lines_of_a_first_try(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of tasks and one of a method: full is there to compare with, the rows that lack are one line, and
    report takes the run that was just made."""
    data = tmp_path / "data"
    solved = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
    passage = {"input": "Question: What is x?\nType:", "context": "a word " * 60, "answers": ["Food"], "length": 70}
    rows = {
        "gsm8k/train.jsonl": solved,
        "gsm8k/test.jsonl": solved,
        "trec.jsonl": {**passage, "dataset": "trec", "language": "en", "all_classes": ["Food"], "_id": "a"},
    }
    for name, row in rows.items():
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    lines = [
        ["run", "--tasks", "gsm8k,longbench", "--methods", "mix"],
        ["report"],
    ]
    here = ["--model", str(tiny_folder), "--data-dir", str(data), "--device", "cpu", "--cache-size", "64"]
    here += ["--num-fewshot", "0", "--gen-kwargs", "max_gen_toks=8", "--window-size", "8"]
    with pytest.raises(SystemExit) as ended:
        main([*lines[0], *here])
    said = capsys.readouterr()
    assert ended.value.code == 1, "twenty datasets have no rows"
    (failed,) = [line for line in said.err.splitlines() if "no rows in --data-dir" in line]
    assert "longbench:lcc" in failed
    (run,) = (tmp_path / "runs").iterdir()
    with pytest.raises(SystemExit) as ended:
        main(lines[1])
    assert not ended.value.code
    shown = capsys.readouterr()
    assert f"no run named, so this is the newest one, runs/{run.name}" in shown.err
    for name in ("gsm8k", "trec", "full", "mix"):
        assert name in shown.out
