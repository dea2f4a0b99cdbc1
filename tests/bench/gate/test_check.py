"""The regression gate: what noise can explain passes, what was made worse fails, another baseline is refused."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from arkv.scores import PromptScores, score
from arkv.states import Choice, assign
from arkv.steps import Group
from bench.cli import main
from bench.errors import UserError
from bench.gate.comparing import changes, check
from bench.gate.findings import MISSING, NEW, OK, OTHER_MACHINE, SKIPPED, WORSE, Report, Tolerances
from bench.gate.judging import judge
from bench.gate.reading import read, write_baseline
from bench.names import RECORD, RESULTS, SAMPLES
from tests.bench.conftest import read_lines, save_tiny_model
from tests.bench.runs.test_run import go

Sample = dict[str, Any]

SETTINGS: dict[str, Any] = {
    "tasks": ("needle", "fidelity"),
    "quant_type": ("full", "origin", "mix"),
    "cache_ratio": (0.125,),
    "budget_unit": "bytes",
    "quant_format": ("int4",),
    "lengths": (300,),
    "samples": 6,
    "continuation": 8,
}
TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:20_000]
"""Of Python's reference text: all of it takes a second to tokenize."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "measured"
    (model / "text.txt").write_text(TEXT)
    go(model, path, **SETTINGS, text=model / "text.txt")
    return path


def timed(sample: Sample, step_ms: float) -> Sample:
    """The sample as if every token had taken so long."""
    decode_s = step_ms / 1000 * max(sample["generated_tokens"] - 1, sample["scored_tokens"])
    return {**sample, "decode_s": decode_s, "tpot_ms": step_ms if sample["tpot_ms"] is not None else None}


def noisy(seed: int, *, slower: float = 1.0, noise: float = 0.02) -> Callable[[Sample], Sample]:
    """Times of a busy machine: 15 % apart from run to run, ``noise`` in every reading, a stall in one of fifty.

    ``slower`` is a factor on mix' time per token.
    """
    rng = random.Random(seed)
    machine = rng.gauss(0, 0.15)
    steps = {"full": 80.0, "origin": 75.0, "mix": 120.0 * slower}

    def change(sample: Sample) -> Sample:
        stall = 1.5 if rng.random() < 0.02 else 1.0
        return timed(sample, steps[sample["method"]] * stall * math.exp(machine + rng.gauss(0, noise)))

    return change


def copied(source: Path, path: Path, change: Callable[[Sample], Sample | None] = lambda sample: sample) -> Path:
    """A run folder as ``source``, with other samples; None leaves one out."""
    shutil.copytree(source, path, ignore=shutil.ignore_patterns(".lock"))
    lines = [changed for sample in read_lines(source / SAMPLES) if (changed := change(sample)) is not None]
    (path / SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def edited(path: Path, **changes: Any) -> Path:
    """With other entries in the record."""
    record = json.loads((path / RECORD).read_text())
    (path / RECORD).write_text(json.dumps({**record, **changes}))
    return path


@pytest.fixture
def baseline(measured: Path, tmp_path: Path) -> Path:
    write_baseline(copied(measured, tmp_path / "first", noisy(0)), tmp_path / "baseline")
    return tmp_path / "baseline"


def gate(run: Path, baseline: Path, **tolerances: Any) -> Report:
    return check(read(run), read(baseline), Tolerances(**tolerances))


def worse(report: Report) -> set[tuple[str, str]]:
    """Method and quantity of everything that became worse."""
    return {(item.cell.split()[0], item.what) for item in report.findings if item.outcome == WORSE}


# --- One quantity ---


@pytest.mark.parametrize(
    ("run", "before", "outcome"),
    [
        ([1.0] * 8, [1.0] * 8, OK),
        # One of eight may be chance; six of eight are not.
        ([0.0] + [1.0] * 7, [1.0] * 8, OK),
        ([0.0] * 6 + [1.0] * 2, [1.0] * 8, WORSE),
        # Sure, and smaller than the tolerance.
        ([0.5 + 0.01 * i for i in range(8)], [0.51 + 0.01 * i for i in range(8)], OK),
        ([0.5, 0.1, 0.3, 0.4, 0.2], [0.7, 0.32, 0.5, 0.61, 0.4], WORSE),
        # Of too few documents every one must be worse.
        ([0.0, 1.0], [1.0, 1.0], OK),
        ([0.0, 0.2], [1.0, 1.0], WORSE),
    ],
)
def test_a_drop_fails_when_it_is_neither_noise_nor_tolerated(
    run: list[float], before: list[float], outcome: str
) -> None:
    assert judge(run, before, 0.02, higher_is_better=True)[0] == outcome
    # The same where less is better.
    assert judge([1 - x for x in run], [1 - x for x in before], 0.02, higher_is_better=False)[0] == outcome


# --- Answers ---

INTEL = {"cpu": "one", "cores": 2, "torch_threads": 2, "cpu_kernel": True}


@pytest.fixture
def passkeys(measured: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run whose ``mix`` finds all passkeys but the first ``lost``; all other answers are right."""

    def make(name: str, lost: int = 0, **record: Any) -> Path:
        lines = [line for line in read_lines(measured / SAMPLES) if line["task"] == "needle"]
        documents = list(dict.fromkeys(line["document"] for line in lines))

        def changed(sample: Sample) -> Sample | None:
            if sample["task"] != "needle":
                return sample
            wrong = sample["method"] == "mix" and documents.index(sample["document"]) < lost
            return {**sample, "score": float(not wrong), "scores": {"exact_match": float(not wrong)}}

        return edited(copied(measured, tmp_path / name, changed), **{"hardware": INTEL, **record})

    return make


def lost_line(report: Report) -> str:
    return next((note for note in report.notes if note.startswith("lost: ")), "")


def test_every_lost_answer_fails_on_the_same_terms_and_is_listed(passkeys: Callable[..., Path]) -> None:
    baseline = passkeys("baseline")
    assert not gate(passkeys("same"), baseline, judge_speed=False).failed
    documents = list(dict.fromkeys(x["document"] for x in read_lines(baseline / SAMPLES) if x["task"] == "needle"))
    for lost in range(1, 7):
        report = gate(passkeys(f"of-{lost}", lost), baseline, judge_speed=False)
        assert ("mix", "needle exact_match, right answers") in worse(report)
        assert lost_line(report).endswith(": " + ", ".join(documents[:lost]))
        assert "mix" in lost_line(report)
    # A new commit, other threads or a package that answers do not go through are no excuse.
    record = {"commit": "f" * 40, "hardware": {**INTEL, "cores": 8, "torch_threads": 8}, "python": "3.99"}
    assert gate(passkeys("commit", 1, **record), baseline, judge_speed=False).failed
    # Answers that are found make up for none.
    assert not gate(baseline, passkeys("before", 3), judge_speed=False).failed


def test_a_right_answer_that_has_no_score_any_more_is_lost_and_hides_no_other(
    passkeys: Callable[..., Path], tmp_path: Path
) -> None:
    baseline = passkeys("baseline")

    def changed(sample: Sample) -> Sample:
        is_first = sample["task"] == "needle" and sample["document"] == first
        if is_first and sample["method"] == "mix":
            return {**sample, "score": None, "scores": {"exact_match": None}}
        return {**sample, "score": 0.0, "scores": {"exact_match": 0.0}} if is_first else sample

    first = next(line["document"] for line in read_lines(baseline / SAMPLES) if line["task"] == "needle")
    report = gate(copied(baseline, tmp_path / "unscored", changed), baseline, judge_speed=False)
    lost = [note for note in report.notes if note.startswith("lost: ")]
    assert {note.split(", ")[1].split()[0].rstrip(":") for note in lost} >= {"full", "mix"}
    assert all(note.endswith(f": {first}") for note in lost)


def test_what_may_be_lost_can_be_said(passkeys: Callable[..., Path]) -> None:
    baseline, two = passkeys("baseline"), passkeys("two", 2)
    assert not gate(two, baseline, judge_speed=False, lost=0.3).failed
    assert gate(two, baseline, judge_speed=False, lost=0.1).failed
    with pytest.raises(UserError, match="tolerance of lost: 1\\.5 is no share"):
        Tolerances(lost=1.5)


@pytest.mark.parametrize(
    "record",
    [
        {"hardware": {**INTEL, "cpu": "another"}},
        {"hardware": {}},
        {"packages": {"torch": "99"}},
        {"models": {"tiny": {"dtype": "float16", "device": "cpu"}}},
    ],
)
def test_on_other_terms_rounding_may_cost_an_answer_and_half_of_them_fails(
    passkeys: Callable[..., Path], record: dict[str, Any]
) -> None:
    baseline = passkeys("baseline")
    report = gate(passkeys("one", 1, **record), baseline, judge_speed=False)
    assert not report.failed
    assert lost_line(report), "it is listed all the same"
    (said,) = [note for note in report.notes if note.startswith("sums are rounded in another way")]
    assert "up to 5 % of the right answers" in said
    assert "run the baseline's commit here" in said
    assert gate(passkeys("two", 2, **record), baseline, judge_speed=False).failed
    assert gate(passkeys("strict", 1, **record), baseline, judge_speed=False, lost=0.0).failed


def test_a_new_baseline_says_what_it_changes(passkeys: Callable[..., Path]) -> None:
    baseline, new = passkeys("baseline"), passkeys("new", 2, hardware={**INTEL, "cpu": "another"})
    said = changes(new, baseline)
    assert any(line.startswith("worse: needle exact_match, right answers, mix") for line in said)
    assert any(line.startswith("lost: needle exact_match, mix") for line in said)
    assert "cpu: one in the baseline, now another" in said
    assert changes(new, baseline.with_name("none")) == []


def test_the_record_of_another_machine_passes_against_the_baseline_of_ci(tmp_path: Path) -> None:
    results = Path(__file__).parents[3] / "results" / "ci"
    run = edited(copied(results, tmp_path / "ci"), hardware={**INTEL, "cpu": "another"})
    assert not gate(run, results, judge_speed=False).failed


# --- Speed ---


def twenty(measured: Path, tmp_path: Path, slower: float) -> list[Report]:
    """Runs against baselines, each with times of its own."""
    return [
        gate(
            copied(measured, tmp_path / f"run-{seed}", noisy(seed, slower=slower)),
            copied(measured, tmp_path / f"baseline-{seed}", noisy(100 + seed)),
        )
        for seed in range(20)
    ]


def test_an_unchanged_run_passes_twenty_times(measured: Path, tmp_path: Path) -> None:
    for report in twenty(measured, tmp_path, 1.0):
        assert not report.failed, [item for item in report.findings if item.outcome != OK]
        speeds = [item for item in report.findings if item.what.startswith("tokens/s")]
        assert [item.outcome for item in speeds] == [OK, OK]


def test_ten_percent_slower_fails(measured: Path, tmp_path: Path) -> None:
    failed = [report for report in twenty(measured, tmp_path, 1.1) if report.failed]
    # Once in a while too many of twelve documents stall.
    assert len(failed) >= 18
    for report in failed:
        assert worse(report) == {("mix", "tokens/s over full's")}
        (line,) = [item for item in report.findings if item.outcome == WORSE]
        assert "tolerance 3.0 %" in line.change


def test_noise_is_not_taken_for_a_change_nor_hidden(measured: Path, baseline: Path, tmp_path: Path) -> None:
    # So loud that 10 % cannot be seen: it passes, and the line says what would not.
    report = gate(copied(measured, tmp_path / "loud", noisy(3, slower=1.1, noise=0.3)), baseline)
    (line,) = [item for item in report.findings if item.cell.startswith("mix") and item.what.startswith("tokens")]
    assert line.outcome == OK
    assert float(line.note.split("a drop of ")[1].split(" %")[0]) > 15


def test_a_machine_that_is_slower_as_a_whole_passes(measured: Path, baseline: Path, tmp_path: Path) -> None:
    noise = noisy(4)

    def slower(sample: Sample) -> Sample:
        changed = noise(sample)
        return timed(changed, 3 * (changed["tpot_ms"] or 1000 * changed["decode_s"] / changed["scored_tokens"]))

    assert not gate(copied(measured, tmp_path / "slower", slower), baseline).failed


def test_other_hardware_has_a_wider_tolerance_and_is_named(measured: Path, baseline: Path, tmp_path: Path) -> None:
    slow = copied(measured, tmp_path / "slow", noisy(1, slower=1.15))
    assert gate(slow, baseline).failed
    hardware = {**read(slow).of_run.hardware, "cpu": "another", "cores": 4, "torch_threads": 4}
    report = gate(edited(slow, hardware=hardware), baseline)
    assert not report.failed
    assert f"tolerance {100 * OTHER_MACHINE:.1f} %" in "".join(item.change for item in report.findings)
    assert any(note.startswith("cpu: ") and note.endswith("now another") for note in report.notes)
    assert gate(slow, baseline, speed=0.05).failed
    assert not gate(slow, baseline, judge_speed=False).failed


def test_speed_on_other_instructions_is_not_judged(measured: Path, baseline: Path, tmp_path: Path) -> None:
    of = {**INTEL, "instructions": "AVX512"}
    before = edited(copied(baseline, tmp_path / "before"), hardware=of)
    now = copied(measured, tmp_path / "now", noisy(1, slower=3.0))
    assert gate(edited(now, hardware=of), before).failed
    report = gate(edited(now, hardware={**of, "instructions": "AVX2"}), before)
    assert not report.failed
    assert "speed is not judged: instructions: AVX512 in the baseline, now AVX2" in report.notes


@pytest.mark.parametrize(("larger", "passes"), [(1.3, True), (2.0, False)])
def test_a_divergence_may_grow_by_half_where_sums_are_rounded_in_another_way(
    measured: Path, baseline: Path, tmp_path: Path, larger: float, passes: bool
) -> None:
    def grown(sample: dict[str, Any]) -> dict[str, Any]:
        scores = {name: value * larger if name == "kl" else value for name, value in sample["scores"].items()}
        return {**sample, "scores": scores}

    run = copied(measured, tmp_path / "run", grown)
    assert ("mix", "fidelity kl") in worse(gate(run, baseline, judge_speed=False))
    elsewhere = edited(run, hardware={**read(run).of_run.hardware, "cpu": "another"})
    report = gate(elsewhere, baseline, judge_speed=False)
    assert (("mix", "fidelity kl") not in worse(report)) == passes
    assert any("divergences may grow by 50 %" in note for note in report.notes)
    assert ("mix", "fidelity kl") in worse(gate(elsewhere, baseline, judge_speed=False, divergence=0.05))


def test_speed_of_few_documents_is_left_open(measured: Path, baseline: Path, tmp_path: Path) -> None:
    few = {sample["document"] for sample in read_lines(measured / SAMPLES)[:15]}
    some = copied(measured, tmp_path / "few", lambda sample: sample if sample["document"] in few else None)
    report = check(read(some), read(baseline), Tolerances(), partial=True)
    assert not report.failed
    assert [item.outcome for item in report.findings if item.what.startswith("tokens/s")] == [SKIPPED, SKIPPED]


# --- Scores, divergence, bytes ---


def drop_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """What falls to Quantized is evicted instead."""

    def dropping(*arguments: Any) -> Choice:
        choice = assign(*arguments)
        return choice._replace(demoted=torch.full_like(choice.demoted, -1))

    monkeypatch.setattr("arkv.layer.assign", dropping)


def shuffle_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(*arguments: Any) -> PromptScores:
        scores = score(*arguments)
        order = torch.randperm(scores.importance.shape[-1], generator=torch.Generator().manual_seed(0))
        return scores._replace(importance=scores.importance[..., order])

    monkeypatch.setattr("arkv.measure.score", shuffled)


def test_quantized_tokens_that_are_lost_fail(
    model: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_quantized(monkeypatch)
    go(model, tmp_path / "spoiled", **{**SETTINGS, "tasks": ("fidelity",), "text": model / "text.txt"}, gamma=0.0)
    report = check(read(tmp_path / "spoiled"), read(measured), Tolerances(judge_speed=False), partial=True)
    assert ("mix", "fidelity kl") in worse(report)
    assert {method for method, _ in worse(report)} == {"mix"}
    assert any("other settings of the method" in note for note in report.notes), "gamma is another one"


@pytest.mark.slow
def test_tokens_kept_at_random_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the default model: attention of a random one does not tell what will be needed."""
    settings = {**SETTINGS, "tasks": ("needle",), "quant_type": ("full", "mix"), "lengths": (500,), "dtype": "auto"}
    # Only the window's queries score, which is what is shuffled.
    settings |= {"model": ("smollm2-135m",), "window_size": (32,), "cache_ratio": (0.25,), "query_span": 1}
    folder = Path("smollm2-135m")
    go(folder, tmp_path / "baseline", **settings)
    shuffle_scores(monkeypatch)
    go(folder, tmp_path / "shuffled", **settings, gamma=0.0)
    report = gate(tmp_path / "shuffled", tmp_path / "baseline", judge_speed=False)
    assert worse(report) == {("mix", "needle exact_match"), ("mix", "needle exact_match, right answers")}


def test_bytes_may_not_rise(measured: Path, baseline: Path, tmp_path: Path) -> None:
    def larger(sample: Sample) -> Sample:
        factor = 1.03 if sample["method"] == "origin" else 1.0
        return {**noise(sample), "kv_bytes": round(sample["kv_bytes"] * factor)}

    noise = noisy(1)
    report = gate(copied(measured, tmp_path / "larger", larger), baseline)
    assert worse(report) == {("origin", "needle KV bytes"), ("origin", "fidelity KV bytes")}
    assert not gate(tmp_path / "larger", baseline, kv_bytes=0.05).failed


def test_an_answer_of_another_length_is_no_rise_of_bytes(measured: Path, baseline: Path, tmp_path: Path) -> None:
    noise = noisy(1)

    def longer(sample: Sample) -> Sample:
        # A full cache grows with the answer; one with a budget does not, but its share of the full one falls.
        sizes = {"full_kv_bytes": round(sample["full_kv_bytes"] * 1.2)}
        return {
            **noise(sample),
            **sizes,
            **({"kv_bytes": sizes["full_kv_bytes"]} if sample["method"] == "full" else {}),
        }

    assert not gate(copied(measured, tmp_path / "longer", longer), baseline).failed


def test_what_is_no_mean_is_compared_by_its_value(measured: Path, baseline: Path, tmp_path: Path) -> None:
    def unknown(sample: Sample) -> Sample:
        return {**sample, "scores": {**sample["scores"], "kl_p95": None}}

    run = copied(measured, tmp_path / "unknown", unknown)
    report = gate(run, baseline, judge_speed=False)
    assert not report.failed
    assert "no interval" in next(item.note for item in report.findings if item.what == "fidelity kl_p95")
    table = (run / RESULTS).read_text().splitlines()
    at = table[0].split(",").index("score")
    for number, line in enumerate(table):
        if ",kl_p95,mix," in line:
            cells = line.split(",")
            cells[at] = str(2 * float(cells[at]))
            table[number] = ",".join(cells)
    (run / RESULTS).write_text("\n".join(table) + "\n")
    assert worse(gate(run, baseline, judge_speed=False)) == {("mix", "fidelity kl_p95")}


# --- What is missing, and what must not be compared ---


def test_an_incomplete_run_fails_and_is_reported_as_far_as_it_went(
    measured: Path, baseline: Path, tmp_path: Path
) -> None:
    noise = noisy(1)

    def until(sample: Sample) -> Sample | None:
        return noise(sample) if sample["task"] == "needle" or sample["document"].endswith(("-0", "-1")) else None

    run = edited(copied(measured, tmp_path / "stopped", until), finished=None)
    (run / RESULTS).unlink()
    report = gate(run, baseline)
    assert report.failed
    assert {item.note for item in report.findings if item.outcome == MISSING} == {"2 of 6 documents measured"}
    assert {item.what for item in report.findings if item.outcome == OK} >= {"needle exact_match", "needle KV bytes"}
    assert f"{run} has not ended" in report.notes
    assert not check(read(run), read(baseline), Tolerances(), partial=True).failed


def test_methods_that_are_gone_or_new(measured: Path, baseline: Path, tmp_path: Path) -> None:
    def renamed(sample: Sample) -> Sample:
        is_mix = sample["method"] == "mix"
        return {**sample, "cell": "mix-new", "quant_format": "int8"} if is_mix else sample

    report = gate(copied(measured, tmp_path / "renamed", renamed), baseline, judge_speed=False)
    assert report.failed
    assert {item.cell.split()[0] for item in report.findings if item.outcome == MISSING} == {"mix"}
    assert [item.cell for item in report.findings if item.outcome == NEW] == ["mix-new"]


def other_model(path: Path) -> None:
    fingerprint = json.loads((path / RECORD).read_text())["fingerprint"]
    edited(path, fingerprint={**fingerprint, "models": {"tiny": "f" * 64}})


def change_samples(path: Path, **changes: Any) -> None:
    lines = [{**sample, **changes} for sample in read_lines(path / SAMPLES)]
    (path / SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_model, "another fingerprint of the model"),
        (lambda path: change_samples(path, prompt_sha256="0"), "other prompts for 6 of 6 documents, the first is "),
        (lambda path: change_samples(path, model="huge"), "nothing in common: fidelity on huge; needle on huge, and"),
        (
            lambda path: change_samples(path, document="x"),
            "nothing in common: other documents of fidelity on tiny; needle on tiny, first x",
        ),
    ],
)
def test_a_baseline_of_something_else_is_refused(
    measured: Path, baseline: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    run = copied(measured, tmp_path / "other")
    change(run)
    with pytest.raises(UserError, match=said) as caught:
        gate(run, baseline)
    assert caught.value.exit_code == 2


def test_other_documents_of_a_part_of_its_tasks_are_named(measured: Path, baseline: Path, tmp_path: Path) -> None:
    run = copied(measured, tmp_path / "other")
    lines = [line for line in read_lines(run / SAMPLES) if line["task"] == "needle"]
    (run / SAMPLES).write_text("".join(json.dumps({**line, "document": "x"}) + "\n" for line in lines))
    with pytest.raises(UserError, match="other documents of needle on tiny, first x") as caught:
        gate(run, baseline)
    assert caught.value.exit_code == 2


def test_divergences_of_0_are_not_taken_for_wrong_answers(baseline: Path) -> None:
    found = {item.what: item for item in gate(baseline, baseline).findings if item.cell == "full"}
    assert found["fidelity kl"].change == "+0.000 [+0.000, +0.000], tolerance 0.0010"


# --- The baseline ---


def test_a_baseline_is_small_and_replaced_whole(measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "baseline"
    first = copied(measured, tmp_path / "first", noisy(0))
    assert write_baseline(first, path) == sum(item.stat().st_size for item in path.iterdir())
    assert sorted(item.name for item in path.iterdir()) == [RECORD, RESULTS, SAMPLES]
    assert (path / SAMPLES).stat().st_size < 0.75 * (measured / SAMPLES).stat().st_size
    assert not gate(first, path).failed
    slow = copied(measured, tmp_path / "slow", noisy(1, slower=1.3))
    assert gate(slow, path).failed
    write_baseline(slow, path)
    assert not gate(slow, path).failed
    assert [item.name for item in path.parent.iterdir()] == ["baseline"]


def test_a_baseline_is_not_continued_as_a_run(model: Path, baseline: Path) -> None:
    with pytest.raises(UserError, match="other settings: baseline is True there"):
        go(model, baseline, **SETTINGS)


def test_what_cannot_be_a_baseline(measured: Path, baseline: Path, tmp_path: Path) -> None:
    stopped = edited(copied(measured, tmp_path / "stopped"), finished=None)
    with pytest.raises(UserError, match="has not ended"):
        write_baseline(stopped, baseline)
    failing = edited(copied(measured, tmp_path / "failing"), failures=[{"task": "needle", "error": "no memory"}])
    with pytest.raises(UserError, match="has failures"):
        write_baseline(failing, baseline)
    assert "failed in the run: needle: no memory" in gate(failing, baseline, judge_speed=False).notes
    with pytest.raises(UserError, match="the run itself"):
        write_baseline(measured, measured)
    (baseline / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds more than a baseline \(notes.txt\)"):
        write_baseline(measured, baseline)
    assert (baseline / "notes.txt").is_file()


# --- The command ---


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["check", *map(str, arguments)])
    return int(caught.value.code or 0)


def test_the_command_prints_a_line_each_and_a_summary_for_ci(
    measured: Path,
    baseline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = tmp_path / "step.md"
    step.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    good, bad = (copied(measured, tmp_path / name, noisy(1, slower=s)) for name, s in (("good", 1.0), ("bad", 1.2)))
    assert command(good, "--against", baseline) == 0
    lines = capsys.readouterr().out.splitlines()
    # Three methods: five metrics and two sizes each, and two speeds.
    assert len(lines) == 3 * 7 + 2 + 1
    assert lines[-1] == "passed: 23 ok"
    assert all(" -> " in line and "tolerance" in line for line in lines[:-1])
    assert command(bad, "--against", baseline, "--markdown", tmp_path / "check.md") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: 1 worse, 22 ok"
    text = (tmp_path / "check.md").read_text()
    assert step.read_text().startswith("before\n### arkv-bench check passed")
    assert step.read_text().endswith(text)
    head, rows = text.split("<details>", 1)
    assert "| worse | mix 12.5 % of each prompt's bytes int4 | tokens/s over full's |" in head
    assert rows.count("| ok |") == 22
    assert command(bad, "--against", baseline, "--speed-tolerance", "0.3") == 0
    assert command(bad, "--against", baseline, "--no-speed") == 0
    capsys.readouterr()
    assert command(bad, "--against", baseline, "--update") == 0
    assert capsys.readouterr().out.startswith(f"wrote {baseline}, ")
    assert command(bad, "--against", baseline) == 0


def nonsense(path: Path) -> None:
    lines = (path / RESULTS).read_text().splitlines()
    lines[2] = lines[2].replace(",6,", ",many,", 1)
    (path / RESULTS).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("spoil", "said", "code"),
    [
        (nonsense, "line 3, column 'n': 'many' is no number", 1),
        (lambda path: (path / SAMPLES).write_text('{"model": "tiny"}\n'), "line 1, field 'task': missing", 1),
        (lambda path: (path / SAMPLES).write_text("oops\nx\n"), "line 1: not valid JSON", 1),
        (lambda path: (path / SAMPLES).unlink(), "has no samples", 1),
        (lambda path: (path / RECORD).unlink(), "is no run folder", 2),
    ],
)
def test_damaged_folders_are_named_in_one_line(
    measured: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    said: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copied(measured, tmp_path / "damaged")
    spoil(run)
    assert command(run, "--against", measured) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_tolerances_are_shares(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(measured, "--against", measured, "--bytes-tolerance", "2") == 2
    assert "--bytes-tolerance=2.0: give 0 or more, less than 1" in capsys.readouterr().err


# --- With a clock ---


def step_times(path: Path, method: str) -> Iterable[float]:
    return (line["tpot_ms"] for line in read_lines(path / SAMPLES) if line["method"] == method and line["tpot_ms"])


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("ARKV_TIMED_TESTS") != "1", reason="real times need an idle machine: ARKV_TIMED_TESTS=1 runs it"
)
def test_runs_with_real_times(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty unchanged runs pass; ten percent more in every step of mix, slept, fails."""
    settings = {**SETTINGS, "tasks": ("needle",), "quant_type": ("full", "mix"), "lengths": (150,), "samples": 24}
    go(model, tmp_path / "warm", **settings)
    go(model, tmp_path / "baseline", **settings)
    for number in range(20):
        go(model, tmp_path / f"run-{number}", **settings)
        assert not gate(tmp_path / f"run-{number}", tmp_path / "baseline").failed
    attend = Group.attend
    # Of two layers each sleeps half of it.
    pause = 0.1 * statistics.median(step_times(tmp_path / "baseline", "mix")) / 1000 / 2

    def slower(self: Group, *arguments: Any) -> Any:
        until = time.perf_counter() + pause
        while time.perf_counter() < until:
            pass
        return attend(self, *arguments)

    monkeypatch.setattr(Group, "attend", slower)
    go(model, tmp_path / "slow", **settings)
    assert worse(gate(tmp_path / "slow", tmp_path / "baseline")) == {("mix", "tokens/s over full's")}
