"""Reading LongBench's rows: where they may lie, and what may be wrong with them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import hub
from tasks.base import TaskError
from tasks.hub import fetch
from tasks.longbench.data import ARCHIVE, REVISION, load_rows
from tasks.longbench.datasets import DATASETS

TREC = DATASETS["trec"]


def row(**changes: Any) -> dict[str, Any]:
    content = {
        "input": "Question: Who?\u2028Type:",
        "context": "Some examples",
        "answers": ["Individual"],
        "length": 12,
        "dataset": "trec",
        "language": "en",
        "all_classes": ["Food", "Individual"],
        "_id": "1",
    }
    return {name: value for name, value in {**content, **changes}.items() if value is not ...}


def lines(*rows: dict[str, Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(content, ensure_ascii=False) + end for content in rows).encode()


def write(folder: Path, content: bytes, name: str = "trec.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def pack(path: Path, content: bytes, member: str = "data/trec.jsonl") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"__MACOSX/{member}", b"attributes")
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize("folder", ["", "longbench", "data"])
def test_a_file_in_a_folder(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, lines(row(), row(input="second")))
    found = load_rows(TREC, tmp_path)
    assert [r.input for r in found.rows] == ["Question: Who?\u2028Type:", "second"]
    assert found.rows[0].all_classes == ("Food", "Individual")
    assert len(found.sha256) == 64


def test_longbench_e_has_files_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, lines(row()))
    write(tmp_path, lines(row(input="evenly spread")), "trec_e.jsonl")
    assert load_rows(TREC, tmp_path, extended=True).rows[0].input == "evenly spread"
    assert load_rows(TREC, tmp_path).rows[0].input != "evenly spread"


def test_the_official_archive(tmp_path: Path) -> None:
    path = pack(tmp_path / ARCHIVE, lines(row()))
    for given in (tmp_path, path):
        assert len(load_rows(TREC, given).rows) == 1
    with pytest.raises(TaskError, match=r"data\.zip holds no lcc\.jsonl"):
        load_rows(DATASETS["lcc"], path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(TaskError, match="not a sound zip archive"):
        load_rows(TREC, path)


@pytest.mark.parametrize(("place", "value", "said"), [(6, 1, "encrypted"), (8, 99, "compression")])
def test_an_archive_that_cannot_be_opened(tmp_path: Path, place: int, value: int, said: str) -> None:
    """Flags and compression stand before each member, and two bytes further on in the list at the end."""
    path = pack(tmp_path / ARCHIVE, lines(row()))
    content = bytearray(path.read_bytes())
    for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + place + shift] = value
    path.write_bytes(content)
    with pytest.raises(TaskError, match=f"not a sound zip archive: .*{said}"):
        load_rows(TREC, path)


@pytest.mark.parametrize(
    "content",
    [
        lines(row(), row(), end="\r\n"),
        b"\xef\xbb\xbf" + lines(row(), row()),
        lines(row()) + b"\n  \n" + lines(row()).rstrip(b"\n"),
        lines(row(), row()).decode().encode("utf-16"),
    ],
    ids=["windows", "bom", "empty lines, no last line end", "utf-16"],
)
def test_a_file_is_read_as_it_is_meant(tmp_path: Path, content: bytes) -> None:
    expected = load_rows(TREC, write(tmp_path / "plain", lines(row(), row()))).rows
    assert load_rows(TREC, write(tmp_path / "odd", content)).rows == expected


def test_line_ends_within_a_text_stay(tmp_path: Path) -> None:
    write(tmp_path, lines(row(context="a\r\nb\u2028c\x85"), end="\r\n"))
    assert load_rows(TREC, tmp_path).rows[0].context == "a\r\nb\u2028c\x85"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (b'{"input": ', "not JSON"),
        (b"[1]", "not a JSON object"),
        (lines(row(context=...)), "no field 'context'"),
        (lines(row(answers=...)), "no field 'answers'"),
        (lines(row(length=...)), "no field 'length'"),
        (lines(row(all_classes=...)), "no field 'all_classes'"),
        (lines(row(all_classes=[])), "'all_classes' names no class"),
        (lines(row(answers="Individual")), "'answers' must be a list of texts, not 'Individual'"),
        (lines(row(input=None)), "'input' must be a text, not 'None'"),
        (lines(row(length="12")), "'length' must be a whole number, not '12'"),
        (b"\xff\xfe\xfa", "not UTF-8 text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, wrong: bytes, message: str) -> None:
    write(tmp_path, lines(row()) + wrong)
    with pytest.raises(TaskError, match=message) as caught:
        load_rows(TREC, tmp_path)
    assert f"{tmp_path / 'trec.jsonl'}, line 2: " in str(caught.value)


def test_an_answer_that_names_no_paragraph_is_found_at_once(tmp_path: Path) -> None:
    write(tmp_path, lines(row(answers=["19"])), "passage_retrieval_en.jsonl")
    with pytest.raises(TaskError, match=r"line 1: the answer '19' names no paragraph"):
        load_rows(DATASETS["passage_retrieval_en"], tmp_path)


def test_an_empty_list_of_answers_is_kept(tmp_path: Path) -> None:
    assert load_rows(TREC, write(tmp_path, lines(row(answers=[])))).rows[0].answers == ()


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no trec\.jsonl: looked for .*longbench/trec\.jsonl.* official data\.zip"):
        load_rows(TREC, tmp_path)
    with pytest.raises(TaskError, match="has no rows"):
        load_rows(TREC, write(tmp_path, b"\n"))


# --- The hub ---


@pytest.fixture(autouse=True)
def _forget_the_download() -> Iterator[None]:
    yield
    fetch.cache_clear()


def from_hub(monkeypatch: pytest.MonkeyPatch, found: Path | Exception) -> list[dict[str, Any]]:
    """The hub gives ``found``; returns what it was asked for."""
    asked = []

    def download(repository: str, name: str, **settings: Any) -> str:
        asked.append({"repository": repository, "name": name, **settings})
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "_failed", {})
    fetch.cache_clear()
    return asked


def test_a_hub_out_of_reach_is_not_asked_again_for_each_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt waits for a connection; a while later there may be one."""
    asked = from_hub(monkeypatch, ConnectionError("no connection"))
    for dataset in DATASETS.values():
        with pytest.raises(TaskError, match=r"ConnectionError: no connection.*give --data-dir"):
            load_rows(dataset, None)
    assert len(asked) == 1
    monkeypatch.setattr(hub, "AGAIN_S", 0.0)
    with pytest.raises(TaskError, match="no connection"):
        load_rows(TREC, None)
    assert len(asked) == 2


def test_the_hub_is_asked_for_a_pinned_archive_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = from_hub(monkeypatch, pack(tmp_path / ARCHIVE, lines(row())))
    assert len(load_rows(TREC, None).rows) == len(load_rows(TREC, None).rows) == 1
    assert asked == [
        {"repository": "zai-org/LongBench", "name": "data.zip", "repo_type": "dataset", "revision": REVISION}
    ]
    assert len(REVISION) == 40


def test_without_the_hub_it_says_which_files_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for error in (LocalEntryNotFoundError("no connection"), OfflineModeIsEnabled("offline")):
        from_hub(monkeypatch, error)
        with pytest.raises(
            TaskError, match=r"--data-dir with one <dataset>\.jsonl each, or with the official data\.zip"
        ):
            load_rows(TREC, None)


def test_a_damaged_download_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blob = pack(tmp_path / ("0" * 64), lines(row()))
    (tmp_path / ARCHIVE).symlink_to(blob)
    from_hub(monkeypatch, tmp_path / ARCHIVE)
    with pytest.raises(TaskError, match=r"data\.zip is damaged"):
        load_rows(TREC, None)
