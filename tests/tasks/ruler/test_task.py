"""RULER's tasks as a run meets them: documents by settings, scores and averages, and what cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.base import Generated, TaskError
from tasks.hub import _failed, fetch
from tasks.registry import get_task
from tasks.ruler import questions as data
from tasks.ruler.definitions import OFFLINE
from tasks.ruler.essays import Essay, sentences
from tasks.ruler.makers import largest
from tasks.ruler.metrics import string_match_all, string_match_part
from tasks.ruler.questions import load_questions
from tasks.ruler.task import Ruler
from tests.tasks.ruler.conftest import hotpotqa, squad
from tests.tasks.ruler.test_prompts import ask, documents


def test_scores_are_the_official_ones() -> None:
    assert string_match_all("It is 1234567.", ["1234567"]) == 100.0
    assert string_match_all("1234567 and 7654321", ["1234567", "7654321", "1111111", "2222222"]) == 50.0
    assert string_match_all("ABCDE FGHIJ", ["abcde", "FGHIJ", "klmno"]) == pytest.approx(200 / 3)
    assert string_match_all("", ["1"]) == 0.0
    assert string_match_all("12345678", ["1234567"]) == 100.0, "officially a part of a longer number counts"
    assert string_match_part("in new york, they say", ["London", "New York"]) == 100.0
    assert string_match_part("in Paris", ["London", "New York"]) == 0.0
    # A control character is a line break, which no reference spans; the outermost ones are dropped.
    assert string_match_all("\x00new\tyork\n", ["new york"]) == 0.0
    assert string_match_all("\x07answer \x1f", ["answer"]) == 100.0


def test_documents_depend_on_nothing_but_seed_length_and_place(tokenizer: Any) -> None:
    for part in OFFLINE:
        all_of = {d.id: d for d in documents(part, tokenizer, options={"lengths": [7500, 9000], "samples": 3})}
        assert list(all_of) == [f"{length}-{n}" for n in range(3) for length in (7500, 9000)]
        few = documents(part, tokenizer, options={"lengths": [9000], "samples": 9}, limit=2)
        assert [d.id for d in few] == ["9000-0", "9000-1"]
        assert all(d == all_of[d.id] for d in few)
        other = documents(part, tokenizer, options={"lengths": [9000], "samples": 1}, seed=1)
        assert other[0].request != all_of["9000-0"].request
        shared = documents(part, tokenizer, options={"lengths": [7500, 9000], "samples": 3}, limit=3)
        assert [d.id for d in shared] == ["7500-0", "9000-0", "7500-1"]
        share = documents(part, tokenizer, options={"lengths": [9000], "samples": 3}, sampling_ratio=0.5)
        assert len(share) == 2
        assert all(d == all_of[d.id] for d in share)


def test_averages_are_over_tasks_and_of_each_length(tokenizer: Any) -> None:
    group = Ruler(("niah_single_1", "cwe"))
    settings = ask(tokenizer, options={"lengths": [7500, 9000], "samples": 2})
    evaluations, counts = {}, {}
    for task, right in zip(group.tasks(), (1, 5), strict=True):
        mine = task.load(settings)
        # Of the shorter prompts all references are found, of the longer ones a part.
        answers = {
            d.id: Generated(text=" ".join(d.reference if d.info["length"] == 7500 else d.reference[: right // 2]))
            for d in mine
        }
        evaluations[task.name] = task.evaluate(mine, answers)
        counts[task.name] = len(mine)
        assert [m.name for m in task.metrics] == ["string_match", "string_match,7500", "string_match,9000"]
        assert set(task.score(mine[1], answers[mine[1].id])) == {"string_match", "string_match,9000"}
    assert evaluations["ruler:cwe"].values == pytest.approx(
        {"string_match": 60.0, "string_match,7500": 100.0, "string_match,9000": 20.0}
    )
    assert group.evaluate(evaluations, counts).values == pytest.approx(
        {"string_match": 55.0, "string_match,7500": 100.0, "string_match,9000": 10.0}
    )
    assert [metric.name for metric in group.metrics()] == list(evaluations["ruler:cwe"].values)
    assert [task.metrics[0].binary for task in group.tasks()] == [True, None]


def test_a_single_task_has_no_average_and_one_length_no_row_of_its_own(tokenizer: Any) -> None:
    group = Ruler(("vt",))
    (task,) = group.tasks()
    task.load(ask(tokenizer))
    assert [metric.name for metric in task.metrics] == ["string_match"]
    assert group.metrics() == ()
    assert group.evaluate({}, {}).values == {}


def test_a_stand_in_haystack_stands_in_the_row(tokenizer: Any, tmp_path: Path) -> None:
    group = Ruler(("niah_single_2", "vt"))
    essays, chains = group.tasks()
    mine = {task.name: task.load(ask(tokenizer, options={"samples": 1})) for task in group.tasks()}
    assert [metric.name for metric in essays.metrics] == ["string_match (stand-in haystack)"]
    assert [metric.name for metric in chains.metrics] == ["string_match"]
    assert [metric.name for metric in group.metrics()] == ["string_match (stand-in haystack)"]
    assert "stand-in haystack" in essays.notes[0]
    found = {
        task.name: task.evaluate(mine[task.name], {d.id: Generated(text=d.reference[0]) for d in mine[task.name]})
        for task in group.tasks()
    }
    assert group.evaluate(found, {}).values == pytest.approx({"string_match (stand-in haystack)": 60.0})

    path = tmp_path / "essay.txt"
    path.write_text("One short text. It ends soon.")
    essays.load(ask(tokenizer, options={"samples": 1, "haystack": path}))
    assert [metric.name for metric in essays.metrics] == ["string_match"]
    assert re.match(r"the haystack of 6 words is repeated, as officially: \d{3,4} are needed", essays.notes[0])
    # The sizes that are tried on the way to that of the prompts do not count.
    longest = max(int(word) for word in essays.notes[0].split() if word.isdigit())
    path.write_text("One more word. " * (longest // 3 + 1))
    essays.load(ask(tokenizer, options={"samples": 1, "haystack": path}))
    assert essays.notes == ()


def test_what_is_hashed(tokenizer: Any, questions: Path, tmp_path: Path) -> None:
    def hashed(part: str, **arguments: Any) -> str:
        (task,) = Ruler((part,)).tasks()
        task.load(ask(tokenizer, **arguments))
        return task.data_hash()

    path = tmp_path / "essay.txt"
    path.write_text("A text. " * 50)
    own = {"haystack": path, "samples": 1}
    assert hashed("vt") == hashed("fwe") == ""
    assert len({hashed("cwe"), hashed("niah_single_2", options=own), hashed("qa_1", data_dir=questions)}) == 3
    before = hashed("niah_single_2", options=own)
    path.write_text("Another text. " * 50)
    assert hashed("niah_single_2", options=own) != before


@pytest.mark.parametrize(
    ("part", "length", "said"),
    [
        ("niah_single_1", 300, r"300 tokens are too short: the shortest prompt takes \d{3}, and the answer 128"),
        ("niah_multikey_3", 100, "100 tokens are too short"),
        ("vt", 800, "ruler:vt: 800 tokens are too short: the shortest prompt takes"),
        ("cwe", 1000, "1000 tokens are too short"),
        ("fwe", 200, "200 tokens are too short: it has a word for every 50 beside the answer's 50, and needs 4"),
        ("fwe", 300, "300 tokens are too short"),
        ("qa_1", 300, "ruler:qa_1: no question fits 300 tokens with its documents: choose longer lengths"),
        ("vt", 200_000, "ruler:vt: 200000 tokens of prompt and answer exceed the maximum of 100000: choose shorter"),
    ],
)  # fmt: skip
def test_a_length_that_cannot_be(part: str, length: int, said: str, tokenizer: Any, questions: Path) -> None:
    with pytest.raises(TaskError, match=said):
        documents(part, tokenizer, data_dir=questions, options={"lengths": [length]})


@pytest.mark.parametrize(("part", "length", "filled"), [("niah_single_2", 1100, 0.9), ("qa_1", 1200, 0.7)])
def test_a_prompt_that_is_shorter_than_an_official_step_keeps_its_length(
    part: str, length: int, filled: float, tokenizer: Any, tmp_path: Path
) -> None:
    """Not all that fits beside the needle is dropped where the first try was a little too long."""
    articles = squad()
    for article in articles["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            paragraph["context"] += " It is old." * (4 * number)
    (tmp_path / "squad.json").write_text(json.dumps(articles))
    found = documents(part, tokenizer, data_dir=tmp_path, options={"lengths": [length], "samples": 12})
    room = length - found[0].request.max_new_tokens  # type: ignore[union-attr]
    sizes = {document.info["size"] for document in found}
    assert len(sizes) > 1, "some were too long at the first try"
    assert min(document.info["prompt_tokens"] for document in found) > filled * room


def test_names_that_are_unknown() -> None:
    with pytest.raises(TaskError, match="ruler has no task 'niah_multikey2': did you mean niah_multikey_2") as caught:
        get_task("ruler:vt,niah_multikey2")
    assert caught.value.usage
    with pytest.raises(TaskError, match="unknown task 'niah_single_9': did you mean ruler:niah_single_"):
        get_task("niah_single_9")
    assert [task.name for task in get_task("ruler").tasks()] == [f"ruler:{name}" for name in OFFLINE]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.txt", " \n", "the haystack .*e.txt is empty"),
        ("e.json", '{"texts": ""}', r'e.json is no JSON of the form \{"text": "..."\}'),
        ("e.json", "[1", "e.json is no JSON of the form"),
        ("e.txt", None, "cannot read the text .*e.txt: No such file"),
    ],
)
def test_a_haystack_that_is_none(name: str, content: str | None, said: str, tokenizer: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TaskError, match=said):
        documents("niah_single_2", tokenizer, options={"haystack": tmp_path / name})


def test_an_essay_is_read_in_sentences(tmp_path: Path) -> None:
    assert sentences('So it is. "Why?" he said. 3 of 4.5 e.g. this one! (Yes.) End') == [
        "So it is.",
        '"Why?" he said.',
        "3 of 4.5 e.g. this one!",
        "(Yes.)",
        "End",
    ]
    (tmp_path / "e.json").write_text(json.dumps({"text": "One two.\n\nThree  four."}))
    essay = Essay(tmp_path / "e.json", 0)
    assert essay.sentences(4) == ["One two.", "Three four."]
    assert essay.sentences(5) == ["One two.", "Three four.", "One"]
    assert essay.words == 4


def test_the_largest_size_is_found_in_few_steps() -> None:
    for wanted in (1, 5, 24, 25, 26, 49, 50, 51, 399):
        asked: list[int] = []

        def tokens(size: int, asked: list[int] = asked) -> int:
            asked.append(size)
            return 10 * size

        assert largest(tokens, 10 * wanted + 9, least=1, step=25) == wanted
        assert len(asked) < 14
    assert largest(lambda size: 10 * size, 0, least=7, step=5) == 7
    assert largest(lambda size: 10 * size, 10**6, least=10, step=10, most=123) == 123
    assert largest(lambda size: 10 * size, 1000, least=10, step=10, most=123) == 100


def test_a_list_of_words_that_is_exhausted_is_said(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tasks.ruler.counting.word_lists", lambda: type("Lists", (), {"all": [f"w{n:02}" for n in range(60)]})
    )
    (task,) = Ruler(("cwe",)).tasks()
    mine = task.load(ask(tokenizer, options={"lengths": [30_000]}))
    assert all(document.info["size"] == 60 for document in mine)
    assert task.notes == ("prompts are shorter than 30000 tokens: they hold every word there is",)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    from tasks.ruler.words import word_lists

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    word_lists.cache_clear()
    try:
        with pytest.raises(TaskError, match="wonderwords, which is not installed: pip install wonderwords"):
            documents("cwe", tokenizer)
    finally:
        word_lists.cache_clear()


# --- Questions ---


@pytest.fixture(autouse=True)
def _forget_downloads() -> Any:
    fetch.cache_clear()
    _failed.clear()
    yield
    fetch.cache_clear()
    _failed.clear()


def test_questions_as_published(questions: Path) -> None:
    found = load_questions("squad", questions)
    assert len(found.questions) == len(found.documents) == 12
    first = found.questions[0]
    assert found.documents[first.documents[0]].endswith("house 0 is shade-00.")
    assert {found.documents[place][-3:] for place in first.related} == {f"0{n}." for n in range(1, 6)}
    found = load_questions("hotpotqa", questions)
    assert [len(question.documents) for question in found.questions] == [10] * 4
    assert found.questions[1].answers == ("Town 1-3",)
    assert found.documents[0] == "Town 0-0\nIt was founded in 1200. It lies by a river."


def test_the_table_on_the_hub_is_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, questions: Path) -> None:
    import pandas as pd

    rows = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": asked["question"],
            "answers": {"text": [a["text"] for a in asked["answers"]], "answer_start": [0] * len(asked["answers"])},
        }
        for article in squad()["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    path = tmp_path / "validation.parquet"
    pd.DataFrame(rows).to_parquet(path)
    asked = []

    def download(repository: str, name: str, **more: Any) -> str:
        asked.append((repository, name, more["revision"]))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    mine, theirs = load_questions("squad", None), load_questions("squad", questions)
    assert (mine.questions, mine.documents) == (theirs.questions, theirs.documents)
    source = data.SOURCES["squad"]
    assert asked == [(source.repository, source.file, source.revision)]


def test_questions_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match=r"no squad: looked for .*/squad.json, .*/ruler/dev-v2.0.json") as caught:
        load_questions("squad", tmp_path)
    assert caught.value.reason == f"no rows in --data-dir {tmp_path}"

    def offline(*given: Any, **more: Any) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(TaskError, match=r"give --data-dir with hotpotqa.json or hotpot_dev_distractor_v1.json"):
        load_questions("hotpotqa", None)


@pytest.mark.parametrize(
    ("dataset", "content", "said"),
    [
        ("squad", "{", r"squad.json is not squad as published \(JSONDecodeError"),
        ("squad", json.dumps(hotpotqa()), "is not squad as published"),
        ("hotpotqa", json.dumps(squad()), "is not hotpotqa as published"),
        ("squad", '{"data": [{"paragraphs": [{"qas": []}]}]}', r"is not squad as published \(KeyError: 'context'\)"),
        ("squad", '{"data": []}', "has no questions that can be answered"),
    ],
)
def test_questions_that_are_damaged(dataset: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / f"{dataset}.json").write_text(content)
    with pytest.raises(TaskError, match=said):
        load_questions(dataset, tmp_path)


def test_a_question_without_room_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = hotpotqa()
    rows[2]["context"][0][1] = ["Long. " * 400]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    (task,) = Ruler(("qa_2",)).tasks()
    found = task.load(ask(tokenizer, data_dir=tmp_path, options={"lengths": [1500], "samples": 4}))
    assert [document.id for document in found] == ["1500-0", "1500-1", "1500-3"]
    assert task.notes[-1] == "questions left out, whose documents are longer than asked: 1"
