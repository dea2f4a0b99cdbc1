from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.harness.parts import has_parts, question_at, source_of
from bench.harness.task import HarnessTask
from bench.harness.tasks import DESCRIPTIONS, RULER, HarnessGroup, HarnessTasks
from tasks.base import (
    Document,
    Generate,
    Generated,
    LogLikelihood,
    LogLikelihoods,
    Rolling,
    Scored,
    TaskError,
    TaskSettings,
)
from tasks.registry import get_task
from tasks.ruler.definitions import DEFINITIONS
from tests.bench.conftest import define_toys, save_tiny_model

STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {character: i + 2 for i, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return wrapped


def question(i: int) -> dict[str, str]:
    return {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve questions in the shape of GSM8K, and eight to draw examples from."""
    write_rows(tmp_path / "data/gsm8k/test.jsonl", [question(i) for i in range(10, 22)])
    write_rows(tmp_path / "data/gsm8k/train_first8.jsonl", [question(i) for i in range(30, 38)])
    return tmp_path / "data"


def load(
    tokenizer: Any, data: Path | None, name: str = "gsm8k", **arguments: Any
) -> tuple[HarnessTask, list[Document]]:
    task = HarnessTask(name, include_path=arguments.pop("include_path", ()))
    settings = TaskSettings(tokenizer=tokenizer, data_dir=data, **{"max_length": 4096, **arguments})
    return task, task.load(settings)


def prompt(tokenizer: Any, document: Document) -> str:
    return tokenizer.decode(document.request.prompt_ids)


def define(folder: Path, text: str) -> Path:
    """A folder with one task file."""
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(textwrap.dedent(text))
    return folder


TOY = """
    task: toy
    dataset_path: nobody/nothing
    test_split: test
    doc_to_text: "Q: {{question}}"
    doc_to_target: answer
    generation_kwargs: {until: ["."]}
"""


# --- Prompts ---


def test_prompts_are_lm_evals_own(tokenizer: Any, data: Path) -> None:
    task, documents = load(tokenizer, data, limit=2)
    assert [d.id for d in documents] == ["gsm8k-0", "gsm8k-1"]
    first = documents[0]
    assert first.request.max_new_tokens == 256
    assert first.request.stop == ("Question:", "</s>", "<|im_end|>")
    assert first.reference == question(10)["answer"]
    assert not first.truncated
    text = prompt(tokenizer, first)
    assert text.count("Question: ") == 6
    assert text.endswith("\n\nQuestion: What is 10 + 10?\nAnswer:")
    assert first.info == {"row": 0, "prompt_tokens": len(text), "cut_tokens": 0}
    # Five examples drawn by lm-eval with its seed 1234; another release of it that changes them changes the task.
    digest = hashlib.sha256("\0".join(prompt(tokenizer, d) for d in documents).encode()).hexdigest()
    assert digest == "7b7d86d79078b26b89b13174f3ccb0ae6c1e324dbe9362fc9e1c39694d57e3de"
    assert [m.name for m in task.metrics] == [STRICT, FLEXIBLE]
    assert all(m.higher_is_better for m in task.metrics)
    assert load(tokenizer, data, limit=2)[1] == documents


def test_a_limit_takes_the_first_and_changes_no_prompt(tokenizer: Any, data: Path) -> None:
    _, everything = load(tokenizer, data)
    assert len(everything) == 12
    assert load(tokenizer, data, limit=5)[1] == everything[:5]


def test_a_ratio_draws_with_the_seed(tokenizer: Any, data: Path) -> None:
    draws = [load(tokenizer, data, sampling_ratio=0.4, seed=seed)[1] for seed in (0, 0, 1)]
    assert [len(d) for d in draws] == [5, 5, 5]
    assert draws[0] == draws[1] != draws[2]
    for document in draws[0]:
        assert document.id == f"gsm8k-{document.info['row']}"
        assert document.reference == question(10 + document.info["row"])["answer"]
    assert len(load(tokenizer, data, sampling_ratio=0.4, limit=2)[1]) == 2


def test_num_fewshot(tokenizer: Any, data: Path) -> None:
    _, (document, *_) = load(tokenizer, data, options={"num_fewshot": 2, "gen_kwargs": None})
    assert prompt(tokenizer, document).count("Question: ") == 3
    (data / "gsm8k/train_first8.jsonl").unlink()
    _, (document, *_) = load(tokenizer, data, options={"num_fewshot": 0})
    assert prompt(tokenizer, document) == "Question: What is 10 + 10?\nAnswer:"


def test_chat_template(tokenizer: Any, data: Path) -> None:
    options: dict[str, Any] = {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be brief."}
    _, (document, *_) = load(tokenizer, data, options=options)
    text = prompt(tokenizer, document)
    # The template refuses a system message, so it is left out, as lm-eval does.
    assert text.startswith("[user]Question: What is ")
    assert text.endswith("[user]Question: What is 10 + 10?\nAnswer:[assistant]")
    assert text.count("[assistant]") == 2
    _, (document, *_) = load(tokenizer, data, options=options | {"fewshot_as_multiturn": False})
    assert prompt(tokenizer, document).count("[user]") == 1


def test_a_bos_token_is_written_once(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>"
    )
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    write_rows(tmp_path / "data/toy/test.jsonl", [question(1)])
    folder = define(tmp_path / "tasks", TOY)
    _, (plain,) = load(adding, tmp_path / "data", "toy", include_path=[folder])
    folder = define(tmp_path / "other", TOY.replace('"Q: ', '"<s>Q: '))
    _, (written,) = load(adding, tmp_path / "data", "toy", include_path=[folder])
    assert plain.request.prompt_ids == written.request.prompt_ids
    assert plain.request.prompt_ids.count(0) == 1


def test_long_prompts_lose_their_beginning(tokenizer: Any, data: Path) -> None:
    _, (whole, *_) = load(tokenizer, data)
    length = len(whole.request.prompt_ids)
    _, (cut, *_) = load(tokenizer, data, max_length=length + 256 - 10)
    assert cut.truncated
    assert cut.info["cut_tokens"] == 10
    assert cut.request.prompt_ids == whole.request.prompt_ids[10:]
    _, (exact, *_) = load(tokenizer, data, max_length=length + 256)
    assert not exact.truncated
    with pytest.raises(TaskError, match="answer of 256 tokens leaves no room"):
        load(tokenizer, data, max_length=256)


def test_gen_kwargs(tokenizer: Any, data: Path) -> None:
    _, (document, *_) = load(tokenizer, data, options={"gen_kwargs": "max_gen_toks=7"})
    assert document.request.max_new_tokens == 7
    _, (document, *_) = load(tokenizer, data, options={"gen_kwargs": {"max_new_tokens": 9, "until": ["\n", ""]}})
    asked = Generate(prompt_ids=document.request.prompt_ids, max_new_tokens=9, stop=("\n", "", "</s>"))
    assert document.request == asked
    with pytest.raises(TaskError, match="samples its answers"):
        load(tokenizer, data, options={"gen_kwargs": {"do_sample": True, "temperature": 0.8}})
    for refused, said in (
        ({"num_beams": 4}, "generation setting num_beams=4: answers are decoded greedily, one beam"),
        ({"nonsense": 4}, "generation setting nonsense=4: this setting is not known"),
        ({"max_length": 4}, "max_length counts the prompt too: set max_gen_toks"),
    ):
        with pytest.raises(TaskError, match=said):
            load(tokenizer, data, options={"gen_kwargs": refused})
    with pytest.raises(TaskError, match="gen_kwargs"):
        load(tokenizer, data, options={"gen_kwargs": "{nonsense"})
    given = '{"suppress_tokens": [5, 7], "num_beams": 1, "top_k": 3, "repetition_penalty": null}'
    _, (document, *_) = load(tokenizer, data, options={"gen_kwargs": given})
    # Of the settings of sampling those stay that say how: they count with --temperature.
    kept = {"suppress_tokens": [5, 7], "num_beams": 1, "top_k": 3, "repetition_penalty": None}
    assert document.request.generation == kept


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 1, "until": ["e"]},
        {"min_new_tokens": 9, "temperature": 0.0},
        {"suppress_tokens": list(range(0, 300, 2)), "num_beams": 1},
        {"do_sample": False, "top_k": 3},
    ],
)
def test_settings_are_those_of_lm_evals_own_model(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """Those that are passed on, over those of the model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    from bench.engine.engine import Engine
    from bench.harness.requests import to_generate
    from bench.methods.grid import full_cell

    shipped = GenerationConfig(eos_token_id=0, pad_token_id=0, repetition_penalty=1.2, do_sample=True, top_p=0.8)
    monkeypatch.setattr(tiny.model, "generation_config", shipped)
    model = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, max_length=100, device="cpu", batch_size=1)
    prompts = ["The old farmer bought", "I will ask you about the special magic number, 1 2 3 " * 4]
    instances = [
        Instance("generate_until", {}, (prompt, {"max_gen_toks": 12, "until": [], **given}), place)
        for place, prompt in enumerate(prompts)
    ]
    theirs = model.generate_until(instances, disable_tqdm=True)
    settings = TaskSettings(tokenizer=tiny.tokenizer, max_length=100)
    requests = [to_generate("toy", instance, settings, False)[0] for instance in instances]
    cells = [full_cell()]
    engine = Engine(tiny.model, tiny.tokenizer, cells, batch_size=4)
    work = [(Document(id=str(place), request=request), cells) for place, request in enumerate(requests)]
    ours = {document.id: outcome.answer.text for document, outcome in engine.answer_batch(work)}
    assert [ours[str(place)] for place in range(len(prompts))] == theirs


# --- Scores ---


def test_replay_scores_gold_and_wrong_answers(tokenizer: Any, data: Path) -> None:
    task, documents = load(tokenizer, data)
    gold = {d.id: Generated(text=f" {d.reference}") for d in documents}
    assert task.evaluate(documents, gold).values == {STRICT: 1.0, FLEXIBLE: 1.0}
    wrong = {d.id: Generated(text=" I do not know. #### 1") for d in documents}
    evaluation = task.evaluate(documents, wrong)
    assert evaluation.values == {STRICT: 0.0, FLEXIBLE: 0.0}
    assert evaluation.stderr == {STRICT: 0.0, FLEXIBLE: 0.0}


def test_some_answers_of_a_drawn_subset(tokenizer: Any, data: Path) -> None:
    task, documents = load(tokenizer, data, sampling_ratio=0.7, seed=5)
    answers = {}
    for i, document in enumerate(documents[1:]):
        text = str(document.reference) if i % 2 else f"It is {2 * (10 + document.info['row'])}, I think"
        answers[document.id] = Generated(text=text)
    evaluation = task.evaluate(documents, answers)
    singles = [task.score(document, answers[document.id]) for document in documents[1:]]
    for metric in (STRICT, FLEXIBLE):
        assert evaluation.values[metric] == pytest.approx(sum(s[metric] for s in singles) / len(singles))
    assert evaluation.values[FLEXIBLE] == 1.0
    assert 0.0 < evaluation.values[STRICT] < 1.0
    assert evaluation.stderr[STRICT] > 0.0
    assert task.evaluate(documents, {}).values == {}
    # Evaluating leaves the task as it was.
    assert task.evaluate(documents, answers) == evaluation


def test_a_metric_of_the_whole_set_has_a_value_for_one_answer(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "data/toy/test.jsonl", [{"question": str(i), "answer": "the cat sat here"} for i in range(3)])
    folder = define(tmp_path / "tasks", TOY + "    metric_list: [{metric: chrf, aggregation: chrf}]\n")
    pytest.importorskip("sacrebleu")
    task, documents = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    assert [m.name for m in task.metrics] == ["chrf,none"]
    assert task.score(documents[0], Generated(text="the cat sat here"))["chrf,none"] == pytest.approx(100.0)
    assert task.score(documents[0], Generated(text="a dog"))["chrf,none"] < 50.0


def test_data_hash_follows_the_rows(tokenizer: Any, data: Path) -> None:
    first = load(tokenizer, data)[0].data_hash()
    assert len(first) == 64
    assert load(tokenizer, data, limit=1)[0].data_hash() == first
    (data / "gsm8k/train_first8.jsonl").rename(data / "gsm8k/train.jsonl")
    assert load(tokenizer, data)[0].data_hash() == first
    write_rows(data / "gsm8k/train.jsonl", [question(i) for i in range(40, 48)])
    assert load(tokenizer, data)[0].data_hash() != first


# --- Finding tasks ---


def test_rulers_tasks_are_those_of_the_suite(tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=r"ruler_qa_hotpot: lm-eval's RULER loads a tokenizer .*: ruler:qa_2 is"
    ) as caught:
        get_task("ruler_qa_hotpot", fallback=HarnessTasks())
    assert caught.value.usage
    assert RULER.keys() <= set(HarnessTasks().names())
    assert set(RULER.values()) == set(DEFINITIONS)
    # Neither another folder of tasks nor a group leads to it; a task of the user's own may have its name.
    define(tmp_path / "tasks", "group: needles\ntask: [niah_single_1]\n")
    own = HarnessTasks(include_path=[tmp_path / "tasks"])
    for ask in (lambda: own.get("niah_single_1"), lambda: own.get("needles").tasks()):  # type: ignore[union-attr]
        with pytest.raises(TaskError, match="niah_single_1: lm-eval's RULER loads a tokenizer"):
            ask()
    define(tmp_path / "own", TOY.replace("task: toy", "task: niah_single_1"))
    assert isinstance(HarnessTasks(include_path=[tmp_path / "own"]).get("niah_single_1"), HarnessTask)


def test_tasks_are_found_as_a_fallback_of_the_registry() -> None:
    found = get_task("gsm8k", fallback=HarnessTasks())
    assert isinstance(found, HarnessTask)
    assert found.name == "gsm8k"
    assert HarnessTasks().get("no such task") is None
    with pytest.raises(TaskError, match="unknown task 'gsm9k': did you mean gsm8k") as caught:
        get_task("gsm9k", fallback=HarnessTasks())
    assert caught.value.usage
    names = set(HarnessTasks().names())
    assert len(names) > 10_000
    assert set(DESCRIPTIONS) <= names


def test_own_task_files(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "data/toy/test.jsonl", [question(1)])
    folder = define(tmp_path / "tasks", TOY)
    source = HarnessTasks(include_path=[folder])
    assert source.get("toy") is not None
    task, (document,) = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    assert prompt(tokenizer, document) == "Q: What is 1 + 1?"
    assert document.request.stop == (".", "</s>")
    assert task.name == "toy"
    with pytest.raises(TaskError, match="is not a folder"):
        HarnessTasks(include_path=[tmp_path / "nowhere"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("gsm9k", r"lm-eval has no task 'gsm9k': did you mean gsm8k"),
        ("mmlu", r"mmlu is a group of tasks, not a task"),
        ("humaneval", r"humaneval runs code that the model writes, .* give --confirm-run-unsafe-code"),
    ],
)
def test_unsupported_tasks(tokenizer: Any, data: Path, name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load(tokenizer, data, name)


CODE = """
    include: base.txt
    task: program
"""
PROGRAM = (
    TOY.replace("task: toy", "unsafe_code: true")
    + """
    process_results: !function metric.passes
    metric_list: [{metric: passes, aggregation: mean, higher_is_better: true}]
"""
)
METRIC = """
def passes(row, results):
    scope = {}
    exec(results[0], scope)
    return {"passes": float(scope["double"](3) == 6)}
"""


def test_code_of_the_model_runs_where_it_is_confirmed(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    write_rows(tmp_path / "data/program/test.jsonl", [{"question": "Double?", "answer": ""}])
    include = define(tmp_path / "tasks", CODE)
    (include / "base.txt").write_text(textwrap.dedent(PROGRAM))
    (include / "metric.py").write_text(METRIC)
    where: dict[str, Any] = {"name": "program", "include_path": [include]}
    with pytest.raises(TaskError, match="program runs code that the model writes"):
        load(tokenizer, tmp_path / "data", **where)
    task, (document,) = load(tokenizer, tmp_path / "data", **where, options={"confirm_run_unsafe_code": True})
    for text, score in (("double = lambda x: 2 * x", 1.0), ("double = lambda x: x", 0.0)):
        answer = Generated(text=text)
        assert task.score(document, answer) == {"passes,none": score}
        assert task.evaluate([document], {document.id: answer}).values["passes,none"] == score


def test_importing_is_instant() -> None:
    code = "import sys, bench.harness.tasks; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"lm_eval", "datasets", "torch", "transformers"} & set(output.split())


@pytest.mark.slow
def test_the_quick_index_agrees_with_lm_evals() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    # Those have a task of the suite in their place, which the error of each names.
    index = {name: entry for name, entry in index.items() if name not in RULER}
    quick = {name: HarnessTasks().get(name) for name in index}
    missing = [name for name, entry in index.items() if entry.kind.name != "TAG" and quick[name] is None]
    assert missing == []


# --- Multiple choice and perplexity ---


@pytest.fixture
def toys(tmp_path: Path) -> dict[str, Any]:
    tasks, data = define_toys(tmp_path / "toys")
    return {"data": data, "include_path": [tasks]}


def test_choices_share_their_context(tokenizer: Any, toys: dict[str, Any]) -> None:
    task, documents = load(tokenizer, name="toy_west", **toys)
    assert [d.id for d in documents] == [f"toy_west-{i}" for i in range(5)]
    request = documents[1].request
    assert isinstance(request, LogLikelihood)
    assert len({item.context_ids for item in request.continuations}) == 1
    context = tokenizer.decode(request.continuations[0].context_ids)
    assert context.count("Answer:") == 3, "two examples and the question"
    assert context.endswith("What is 11 + 11?\nA. 22\nB. many, 11\nAnswer:")
    assert [tokenizer.decode(item.token_ids) for item in request.continuations] == [" 22", " many, 11"]
    assert documents[1].reference == 1
    assert [metric.name for metric in task.metrics] == ["acc,none", "acc_norm,none"]


def picking(documents: list[Document], right: bool) -> dict[str, LogLikelihoods]:
    """Answers that pick the right choice of two, or the wrong one."""
    return {
        d.id: LogLikelihoods(scored=tuple(Scored(-1.0 - ((i == d.reference) != right), False) for i in range(2)))
        for d in documents
    }


def test_replay_scores_choices(tokenizer: Any, toys: dict[str, Any]) -> None:
    task, documents = load(tokenizer, name="toy_west", **toys)
    assert task.evaluate(documents, picking(documents, True)).values["acc,none"] == 1.0
    assert task.evaluate(documents, picking(documents, False)).values["acc,none"] == 0.0
    answers = picking(documents[1:3], True) | picking(documents[3:], False)
    assert task.evaluate(documents, answers).values["acc,none"] == 0.5
    assert [task.score(d, answers[d.id])["acc,none"] for d in documents[1:]] == [1, 1, 0, 0]


def test_long_contexts_lose_their_beginning_and_choices_none(tokenizer: Any, toys: dict[str, Any]) -> None:
    _, (whole, *_) = load(tokenizer, name="toy_west", **toys)
    _, (cut, *_) = load(tokenizer, name="toy_west", max_length=60, **toys)
    assert cut.truncated
    for before, after in zip(whole.request.continuations, cut.request.continuations, strict=True):
        assert after.token_ids == before.token_ids
        # The last token of a continuation is not read: one more than the model's length.
        assert len(after.context_ids) + len(after.token_ids) == 61
        assert before.context_ids[-len(after.context_ids) :] == after.context_ids
    with pytest.raises(TaskError, match="toy_west, row 0: a choice of 9 tokens does not fit 8"):
        load(tokenizer, name="toy_west", max_length=8, **toys)


def test_texts_are_scored_in_windows(tokenizer: Any, toys: dict[str, Any]) -> None:
    options = {"rolling_prefill": 0.25, "rolling_chunk": 4}
    task, (document, _) = load(tokenizer, name="toy_text", max_length=100, options=options, **toys)
    request = document.request
    assert isinstance(request, Rolling)
    assert (request.prefill_share, request.chunk) == (0.25, 4)
    text = tokenizer.decode([token for window in request.windows for token in window.token_ids])
    assert text == task.official.instances[0].args[0]
    assert all(len(w.context_ids) + len(w.token_ids) <= 101 for w in request.windows)
    assert request.windows[0].context_ids == (tokenizer.bos_token_id,)
    answer = LogLikelihoods(scored=tuple(Scored(-2.0 * len(w.token_ids), False) for w in request.windows))
    # One token a byte, two nats a token.
    assert task.score(document, answer)["bits_per_byte,none"] == pytest.approx(2 / 0.6931472)
    assert not task.metrics[0].higher_is_better


def test_a_group_is_its_tasks_and_their_score(tokenizer: Any, toys: dict[str, Any]) -> None:
    group = HarnessTasks(include_path=toys["include_path"]).get("toys")
    assert isinstance(group, HarnessGroup)
    assert [task.name for task in group.tasks()] == ["toy_east", "toy_west", "toy_text"]
    settings = TaskSettings(tokenizer=tokenizer, max_length=4096, data_dir=toys["data"])
    evaluations, counts = {}, {}
    for task, right in zip(group.tasks()[:2], (True, False), strict=True):
        documents = list(task.load(settings))
        evaluations[task.name] = task.evaluate(documents, picking(documents, right))
        counts[task.name] = len(documents)
    group.tasks()[2].load(settings)
    evaluation = group.evaluate(evaluations, counts)
    assert counts == {"toy_east": 3, "toy_west": 5}
    assert evaluation.values == {"acc,none": 3 / 8}
    assert {m.name for m in group.metrics()} >= {"acc,none", "word_perplexity,none"}


def test_a_group_in_a_group_has_a_score_too(tmp_path: Path) -> None:
    define(tmp_path / "tasks", TOY)
    text = "group: outer\ntask: [{group: inner, task: [{task: toy, num_fewshot: 3}]}, gsm8k]\n"
    (tmp_path / "tasks/outer.yaml").write_text(text)
    group = HarnessTasks(include_path=[tmp_path / "tasks"]).get("outer")
    assert isinstance(group, HarnessGroup)
    assert [member.name for member in group.members] == ["outer::inner", "gsm8k"]
    assert [task.name for task in group.tasks()] == ["toy", "gsm8k"]
    (tmp_path / "tasks/lost.yaml").write_text("group: lost\ntask: [nowhere_to_be_found]\n")
    define(tmp_path / "more", TOY.replace("toy", "other"))
    (tmp_path / "more/lost.yaml").write_text("group: lost\ntask: [nowhere_to_be_found]\n")
    with pytest.raises(TaskError, match="the group lost names 'nowhere_to_be_found', which lm-eval does not define"):
        HarnessTasks(include_path=[tmp_path / "more"]).get("lost").tasks()  # type: ignore[union-attr]


def test_mmlu_has_57_subjects_in_four_groups() -> None:
    group = HarnessTasks().get("mmlu")
    assert isinstance(group, HarnessGroup)
    assert [m.name for m in group.members] == ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]
    assert len({task.name for task in group.tasks()}) == 57


def test_a_subject_takes_its_own_rows(tokenizer: Any, shared_data: Path) -> None:
    task, documents = load(tokenizer, shared_data, "mmlu_anatomy", options={"num_fewshot": 5}, limit=2)
    context = tokenizer.decode(documents[0].request.continuations[0].context_ids)
    assert context.count("Answer:") == 6
    assert len(task.official.eval_docs) == 100
    assert {row["subject"] for row in task.official.eval_docs} == {"anatomy"}


def test_thinking_is_asked_for_and_stripped(tokenizer: Any, data: Path, toys: dict[str, Any]) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
        "{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    chat = {"num_fewshot": 0, "apply_chat_template": True}
    _, (document, *_) = load(thinking, data, options=chat)
    assert prompt(thinking, document).endswith("[assistant]")
    assert document.request.think_end is None
    _, (document, *_) = load(thinking, data, options=chat | {"enable_thinking": False})
    assert prompt(thinking, document).endswith("<think></think>")
    _, (document, *_) = load(thinking, data, options=chat | {"enable_thinking": True})
    assert document.request.think_end == "</think>"
    with pytest.raises(TaskError, match="enable_thinking needs apply_chat_template"):
        load(thinking, data, options={"enable_thinking": True})
    with pytest.raises(TaskError, match="toy_west scores given texts, before which no model thinks"):
        load(thinking, name="toy_west", options=chat | {"enable_thinking": True}, **toys)


# --- Bad inputs ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fewshot": 1}, "gsm8k has no option 'fewshot': did you mean num_fewshot"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number"),
        ({"num_fewshot": "5"}, "num_fewshot must be a whole number"),
        ({"fewshot_as_multiturn": True}, "needs apply_chat_template"),
        ({"num_fewshot": 9}, r"train_first8\.jsonl has 8 rows, too few to draw 9"),
    ],
)
def test_bad_options(tokenizer: Any, data: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load(tokenizer, data, options=options)


def test_missing_rows_name_the_file(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"split 'test': looked for .*nowhere/gsm8k/test\.jsonl and test_\*\.jsonl"):
        load(tokenizer, tmp_path / "nowhere")
    (data / "gsm8k/train_first8.jsonl").unlink()
    with pytest.raises(TaskError, match=r"split 'train': looked for .*gsm8k/train\.jsonl"):
        load(tokenizer, data)


def test_two_files_for_a_split(tokenizer: Any, data: Path) -> None:
    write_rows(data / "gsm8k/train_first2.jsonl", [question(1)] * 9)
    with pytest.raises(TaskError, match="2 files for the split 'train'"):
        load(tokenizer, data)
    write_rows(data / "gsm8k/train.jsonl", [question(1)] * 9)
    assert len(load(tokenizer, data)[1]) == 12


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"test\.jsonl has no rows"),
        ("\n\n", r"test\.jsonl has no rows"),
        ('{"question": "a", "answer": "b"}\n{"question": ', r"test\.jsonl, line 2: not JSON"),
        ("[1, 2]\n", r"test\.jsonl, line 1: not a JSON object"),
        ('{"question": "a", "answer": "b"}\n\n{"answer": "b"}\n', r"test\.jsonl, line 3: .*doc_to_text .*'question'"),
        ('{"question": "a"}\n', r"test\.jsonl, line 1: .*doc_to_target .*'answer'"),
    ],
)
def test_damaged_rows(tokenizer: Any, data: Path, content: str, message: str) -> None:
    (data / "gsm8k/test.jsonl").write_text(content)
    with pytest.raises(TaskError, match=message) as caught:
        load(tokenizer, data)
    assert "\n" not in str(caught.value)


def test_rows_that_a_tasks_code_cannot_read(tokenizer: Any, tmp_path: Path) -> None:
    """What hellaswag's own code reads stands in no template."""
    file = tmp_path / "hellaswag/validation.jsonl"
    good: dict[str, Any] = {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he goes", "label": "1"}
    good["endings"] = ["up.", "down.", "on.", "home."]
    lacking = {key: value for key, value in good.items() if key != "ctx_b"}
    for rows, message in (
        ([good, lacking], r"validation\.jsonl, line 2: no field 'ctx_b', which other rows have"),
        ([lacking, lacking], r"hellaswag: KeyError: 'ctx_b' in rows of .*validation\.jsonl"),
        ([good, {**good, "ctx_b": None}], r"hellaswag: AttributeError: .* in rows of .*validation\.jsonl"),
    ):
        write_rows(file, rows)
        with pytest.raises(TaskError, match=message):
            load(tokenizer, tmp_path, "hellaswag")
    write_rows(file, [good])
    assert len(load(tokenizer, tmp_path, "hellaswag")[1]) == 1


def test_answers_that_a_tasks_code_cannot_score(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "data/toy/test.jsonl", [question(1)])
    folder = define(tmp_path / "tasks", TOY + "    process_results: !function code.score\n")
    (folder / "code.py").write_text("def score(doc, results):\n    return {'exact_match': doc['missing']}\n")
    task, (document,) = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    with pytest.raises(TaskError, match=r"toy-0 cannot be scored: KeyError: 'missing' in rows of .*test\.jsonl"):
        task.score(document, Generated(text="2"))


def test_undecodable_rows(tokenizer: Any, data: Path) -> None:
    (data / "gsm8k/test.jsonl").write_bytes(b'{"question": "\xff", "answer": "b"}\n')
    with pytest.raises(TaskError, match=r"test\.jsonl, line 1: not JSON"):
        load(tokenizer, data)


OPTIONAL = TOY.replace('"Q:', '"{% if hint is defined and hint %}Hint: {{hint}} {% endif %}Q:')


def test_fields_that_only_some_rows_have(tokenizer: Any, tmp_path: Path) -> None:
    """As the datasets library reads JSON: the field is there, and null where a row lacks it."""
    folder = define(tmp_path / "tasks", OPTIONAL)
    rows = [question(1), {**question(2), "hint": "two"}, question(3), {**question(4), "source": {"page": 4}}]
    write_rows(tmp_path / "data/toy/test.jsonl", rows)
    task, documents = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    hinted = [prompt(tokenizer, document).startswith("Hint: two Q:") for document in documents]
    assert hinted == [False, True, False, False]
    assert task.official.eval_docs[0] == {**question(1), "hint": None, "source": None}
    said = [note.partition(str(tmp_path))[0] + note.rpartition("jsonl ")[2] for note in task.notes]
    assert said == [
        "3 of 4 rows of have no field 'hint', which is null there",
        "3 of 4 rows of have no field 'source', which is null there",
    ]
    write_rows(tmp_path / "data/toy/test.jsonl", [{**question(1), "hint": "one"}])
    task, _ = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    assert task.notes == ()


def test_rows_with_other_separators_in_their_texts(tokenizer: Any, tmp_path: Path) -> None:
    folder = define(tmp_path / "tasks", TOY)
    file = tmp_path / "data/toy/test.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"question": f"one{mark}two?", "answer": "3"} for mark in "\u2028\u0085"]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n")
    task, _ = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    assert [row["question"] for row in task.official.eval_docs] == [row["question"] for row in rows]


def test_an_answer_that_is_the_same_for_all_rows(tokenizer: Any, tmp_path: Path) -> None:
    """doc_to_target that names no field is a text, as lm-eval has it."""
    folder = define(tmp_path / "tasks", TOY.replace("doc_to_target: answer", "doc_to_target: unanswerable"))
    write_rows(tmp_path / "data/toy/test.jsonl", [question(1)])
    task, (document,) = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    assert document.reference == "unanswerable"
    assert task.score(document, Generated(text="unanswerable")) == {"exact_match,none": 1.0}
    assert len(task.notes) == 1
    assert "has a field 'unanswerable': doc_to_target is this very word" in task.notes[0]


def test_an_empty_stop_string_ends_an_answer_after_one_token(tokenizer: Any, tmp_path: Path) -> None:
    """It is in every text, and cuts none: so lm-eval's own model class has it."""
    folder = define(tmp_path / "tasks", TOY.replace('["."]', "['']"))
    write_rows(tmp_path / "data/toy/test.jsonl", [question(1)])
    _, (document,) = load(tokenizer, tmp_path / "data", "toy", include_path=[folder])
    assert document.request.stop == ("", "</s>")


@pytest.mark.slow
def test_local_rows_touch_no_cache(data: Path, tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from types import SimpleNamespace
        from bench.harness.task import HarnessTask
        from tasks.base import TaskSettings

        class Words:
            bos_token, eos_token_id = None, 0
            def __call__(self, text): return {{"input_ids": list(range(len(text.split())))}}
            def decode(self, ids): return "</s>"

        settings = TaskSettings(tokenizer=Words(), max_length=4096, data_dir=Path({str(data)!r}))
        task = HarnessTask("gsm8k")
        documents = task.load(settings)
        print(len(documents))
    """
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "HOME": str(home), "TQDM_DISABLE": "0"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=True
    )
    assert process.stdout == "12\n"
    assert process.stderr == ""
    assert not [path for path in home.glob("**/*") if path.is_file()]


def test_offline_without_rows(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = define(tmp_path / "tasks", TOY)
    with pytest.raises(
        TaskError, match=r"cannot load the task toy: .*nobody/nothing.*--data-dir .*toy/<split>\.jsonl"
    ) as caught:
        load(tokenizer, None, "toy", include_path=[folder])
    assert "\n" not in str(caught.value)


def test_rows_of_choices_that_cannot_be_used(tokenizer: Any, toys: dict[str, Any]) -> None:
    file = toys["data"] / "toy_choice/test.jsonl"
    good = {"question": "?", "subject": "west", "choices": ["a", "b"], "answer": 0}
    for row, message in (
        (good | {"choices": ["a", ""]}, "toy_west, row 1: choice 1 is empty, there is nothing to score"),
        ({key: value for key, value in good.items() if key != "choices"}, r"test\.jsonl, line 2: .*'choices'"),
        ({key: value for key, value in good.items() if key != "subject"}, r"test\.jsonl, line 2: no field 'subject'"),
        (good | {"subject": "north"}, None),
    ):
        write_rows(file, [good, row])
        if message is not None:
            with pytest.raises(TaskError, match=message):
                load(tokenizer, name="toy_west", **toys)
    assert len(load(tokenizer, name="toy_west", **toys)[1]) == 1
    with pytest.raises(TaskError, match=r"test\.jsonl has no rows of the subject 'east': did you mean west"):
        load(tokenizer, name="toy_east", **toys)
    write_rows(file, [{key: value for key, value in good.items() if key != "answer"}])
    with pytest.raises(
        TaskError, match=r"test\.jsonl, line 1: no field 'answer', which the task's doc_to_target names"
    ):
        load(tokenizer, name="toy_west", **toys)
    write_rows(toys["data"] / "toy_text/test.jsonl", [{"page": ""}])
    with pytest.raises(TaskError, match="toy_text, row 0: the text is empty"):
        load(tokenizer, name="toy_text", **toys)


# --- Against lm-eval's own model class ---


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_scores_equal_lm_evals_own_run(shared_data: Path, chat: bool) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from arkv import CacheConfig
    from bench.engine.engine import Engine
    from bench.methods.grid import full_cell, tristate_cell
    from bench.models.loading import load as load_model

    loaded = load_model("smollm2-135m")
    model, tokenizer = loaded.model, loaded.tokenizer
    generation = {"max_gen_toks": 48}
    # Fewer than the prompts need with five examples, so that they are cut.
    longest = 1200
    task = HarnessTask("gsm8k")
    documents = task.load(
        TaskSettings(
            tokenizer=tokenizer,
            max_length=longest,
            limit=2,
            data_dir=shared_data,
            options={"gen_kwargs": generation, "apply_chat_template": chat},
        )
    )
    assert any(document.truncated for document in documents)
    cells = [full_cell(), tristate_cell("mix", CacheConfig.for_method("mix", cache_size=512))]
    engine = Engine(model, tokenizer, cells)
    answers, ours = {}, []
    for document in documents:
        full, mix = engine.answer(document, cells)
        answers[document.id] = full.answer
        ours.append(full.answer.text)
        assert mix.tokens_evicted > 0
    files = {"train": "train_first200.jsonl", "test": "test.jsonl"}
    manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k"))
    reference = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, max_length=longest, device="cpu"),
        tasks=[
            {
                "group": "reference",
                "task": [
                    {
                        "task": "gsm8k",
                        "dataset_path": "json",
                        "dataset_name": None,
                        "dataset_kwargs": {
                            "data_files": {split: str(shared_data / "gsm8k" / name) for split, name in files.items()}
                        },
                    }
                ],
            }
        ],
        task_manager=manager,
        limit=2,
        gen_kwargs=generation,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    theirs = [sample["resps"][0][0] for sample in reference["samples"]["gsm8k"] if sample["filter"] == "strict-match"]
    assert ours == theirs
    evaluation = task.evaluate(documents, answers)
    for metric in (STRICT, FLEXIBLE):
        assert evaluation.values[metric] == reference["results"]["gsm8k"][metric]


class Official:
    """lm-eval's Hugging Face model class around a loaded model, and what the engine makes of the same documents."""

    def __init__(self, loaded: Any, max_length: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self.loaded, self.max_length = loaded, max_length
        self.model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=max_length, device="cpu")

    def compare(self, name: str, data: Path, limit: int, **more: Any) -> list[Document]:
        """Fails unless every log-likelihood and every metric of the full cache is lm-eval's own."""
        from lm_eval.evaluator import evaluate

        from bench.engine.engine import Engine
        from bench.methods.grid import grid

        task, documents = load(self.loaded.tokenizer, data, name, max_length=self.max_length, limit=limit, **more)
        cells = grid(["origin", "full"], [{"cache_ratio": 0.25}], [8], None, {})
        engine = Engine(self.loaded.model, self.loaded.tokenizer, cells, batch_size=4)
        answers = {}
        for document in documents:
            origin, full = engine.answer(document, cells)
            answers[document.id] = full.answer
            assert isinstance(full.answer, LogLikelihoods)
            assert isinstance(origin.answer, LogLikelihoods)
            pairs = zip(full.answer.scored, origin.answer.scored, strict=True)
            assert all(abs(a.log_likelihood - b.log_likelihood) > 1e-6 for a, b in pairs), "not read from the cache"
            assert origin.tokens_evicted > 0
        ours = [score for document in documents for score in answers[document.id].scored]
        official = evaluate(
            self.model, {"tasks": {name: task.official}, "groups": {}, "group_map": {}}, limit=limit, log_samples=True
        )
        theirs = [response for sample in official["samples"][name] for (response,) in sample["resps"]]
        if isinstance(documents[0].request, Rolling):
            sums = [sum(score.log_likelihood for score in answers[d.id].scored) for d in documents]
            assert sums == pytest.approx(theirs, abs=1e-3)
        else:
            assert [score.log_likelihood for score in ours] == pytest.approx([pair[0] for pair in theirs], abs=1e-3)
            assert [score.is_greedy for score in ours] == [pair[1] for pair in theirs]
        values = task.evaluate(documents, answers).values
        assert values == pytest.approx({key: official["results"][name][key] for key in values}, rel=1e-4)
        return documents


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def official(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Official:
    from bench.models.loading import load as load_model

    folder = save_tiny_model(tmp_path_factory.mktemp("official") / "tiny", context=2048, family=request.param)
    return Official(load_model(str(folder), dtype="float32", device="cpu"), 80)


def test_toy_scores_equal_lm_evals_own(official: Official, toys: dict[str, Any]) -> None:
    documents = official.compare("toy_west", limit=3, **toys)
    assert all(document.truncated for document in documents)
    (document, *_) = official.compare("toy_text", limit=2, **toys)
    assert len(document.request.windows) > 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "shots"), [("mmlu_anatomy", 2), ("mmlu_virology", 0), ("commonsense_qa", 0)])
def test_choice_scores_equal_lm_evals_own(official: Official, shared_data: Path, name: str, shots: int) -> None:
    official.compare(name, shared_data, 2, options={"num_fewshot": shots})


@pytest.fixture(scope="module")
def smollm2() -> Official:
    from bench.models.loading import load as load_model

    return Official(load_model("smollm2-135m", dtype="float32"), 2048)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shots", "limit"),
    [
        *[(f"mmlu_{subject}", 5, 2) for subject in ("anatomy", "global_facts", "sociology", "virology")],
        ("mmlu_world_religions", 5, 8),
        ("commonsense_qa", 0, 40),
    ],
)
def test_the_default_model_scores_choices_as_under_lm_eval(
    smollm2: Official, shared_data: Path, name: str, shots: int, limit: int
) -> None:
    documents = smollm2.compare(name, shared_data, limit, options={"num_fewshot": shots})
    assert {len(item.token_ids) for d in documents for item in d.request.continuations} == {1}  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_default_model_scores_texts_as_under_lm_eval(smollm2: Official, toys: dict[str, Any]) -> None:
    smollm2.compare("toy_text", limit=2, **toys)


# --- Context and question ---


def test_a_definition_says_whether_context_and_question_can_be_told_apart() -> None:
    text = {"output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:"}
    about = {**text, "doc_to_text": "{{ passage }}\nQuestion: {{question}}?\nAnswer:"}
    rolling = {**about, "output_type": "loglikelihood_rolling"}
    assert not has_parts(text, None)
    assert has_parts({**text, "num_fewshot": 5}, None)
    assert not has_parts({**text, "num_fewshot": 5}, 0)
    assert has_parts(text, 2)
    assert has_parts(about, None)
    assert has_parts(about, 0)
    assert not has_parts(rolling, 2)
    # A function may read any field.
    assert not has_parts({**text, "doc_to_text": len}, None)


class _Asking:
    """A task of lm-eval as far as its questions go."""

    def __init__(self, template: str) -> None:
        self.config = SimpleNamespace(doc_to_text=template)

    def doc_to_text(self, doc: dict[str, str]) -> str:
        from lm_eval.utils import apply_template

        return str(apply_template(self.config.doc_to_text, doc))


def test_a_question_begins_behind_examples_and_passage() -> None:
    task = _Asking("{{passage}}\nQuestion: {{question}}?")
    doc = {"passage": "The river runs.", "question": "Does it"}
    asked = "The river runs.\nQuestion: Does it?"
    for prompt in (asked, f"A.\nQuestion: b? no\n\n{asked}", f"{asked} yes\n\n{asked}", f"<user>{asked}<assistant>"):
        begin = question_at(task, SimpleNamespace(args=(prompt, {}), doc=doc))
        assert prompt[begin:].startswith("\nQuestion: Does it?")
        assert prompt[:begin].endswith("The river runs.")
    plain = _Asking("Question: {{question}}?")
    instance = SimpleNamespace(args=("Question: a? b\n\nQuestion: Does it?", {}), doc=doc)
    assert instance.args[0][question_at(plain, instance) :] == "Question: Does it?"
    # Nothing stands before it, or it is not there.
    for prompt in ("Question: Does it?", "Something else"):
        assert question_at(plain, SimpleNamespace(args=(prompt, {}), doc=doc)) is None


def test_questions_about_one_passage_are_of_one_source() -> None:
    task = _Asking("{{passage}}\nQuestion: {{question}}?")
    row = {"passage": "The river runs.", "question": "Does it"}
    assert source_of(task, row) == source_of(task, {**row, "question": "Where to"}) is not None
    assert source_of(task, row) != source_of(task, {**row, "passage": "The river stands."})
    assert source_of(_Asking("Question: {{question}}?"), row) is None


def test_examples_are_the_context_of_the_question(tokenizer: Any, tmp_path: Path) -> None:
    """Tokens and scores are those of the undivided prompt; all questions of a subject share one context."""
    tasks, data = define_toys(tmp_path)
    found = {}
    for question in ("before", "after"):
        task = HarnessTask("toy_west", include_path=[tasks])
        assert task.has_parts
        settings = TaskSettings(
            tokenizer=tokenizer,
            max_length=2_000,
            data_dir=data,
            question=question,  # type: ignore[arg-type]
        )
        found[question] = task.load(settings)
    contexts = set()
    for before, after in zip(found["before"], found["after"], strict=True):
        assert isinstance(before.request, LogLikelihood)
        assert isinstance(after.request, LogLikelihood)
        for whole, parts in zip(before.request.continuations, after.request.continuations, strict=True):
            assert whole.question_ids == ()
            assert parts.context_ids + parts.question_ids == whole.context_ids
            assert parts.token_ids == whole.token_ids
            assert tokenizer.decode(parts.question_ids).startswith("What is ")
            contexts.add(parts.context_ids)
        assert after.info == before.info
    assert len(contexts) == 1
    # A cut that leaves nothing before the question leaves it inside.
    short = TaskSettings(tokenizer=tokenizer, max_length=30, data_dir=data, question="after")
    for document in HarnessTask("toy_west", include_path=[tasks]).load(short):
        assert isinstance(document.request, LogLikelihood)
        assert {item.question_ids for item in document.request.continuations} == {()}
