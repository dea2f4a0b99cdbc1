"""A download: resumed, checked, and given up with what has come kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.models.download import ATTEMPTS, download
from bench.models.index import Index
from tests.bench.models.serving import Served

CONTENT = bytes(range(256)) * 40
NAME = "tiny_model-1.0-py3-none-any.whl"


class Fetched:
    """One download, told to fail by what the index does."""

    def __init__(self, served: Served, target: Path) -> None:
        served.files[NAME] = CONTENT
        self.served, self.target = served, target
        self.part = target.with_name(f"{NAME}.part")
        self.progress: list[int] = []
        self.pauses: list[float] = []

    def __call__(self, content: bytes = CONTENT) -> None:
        download(
            Index(),
            f"{self.served.url.removesuffix('/simple')}/files/{NAME}",
            self.target,
            size=len(CONTENT),
            sha256=hashlib.sha256(content).hexdigest(),
            progress=self.progress.append,
            pause=self.pauses.append,
        )

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.served.asked]


@pytest.fixture
def fetched(served: Served, tmp_path: Path) -> Fetched:
    return Fetched(served, tmp_path / NAME)


def test_a_broken_connection_is_resumed(fetched: Fetched) -> None:
    fetched.served.ends_after = [1000, 0, 2000]
    fetched()
    assert fetched.target.read_bytes() == CONTENT
    assert fetched.ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=3000-"]
    assert fetched.pauses == [1.0, 2.0, 1.0]
    assert fetched.progress[-1] == len(CONTENT)
    assert fetched.progress == sorted(fetched.progress)
    assert not fetched.part.exists()


def test_an_index_that_cannot_resume_is_asked_for_all(fetched: Fetched) -> None:
    fetched.served.resumes = False
    fetched.part.write_bytes(CONTENT[:5000])
    fetched()
    assert (fetched.ranges, fetched.target.read_bytes()) == (["bytes=5000-"], CONTENT)


def test_it_is_given_up_with_what_has_come_kept(fetched: Fetched) -> None:
    fetched.served.ends_after = [1000, *[0] * (ATTEMPTS - 1)]
    with pytest.raises(UserError, match=r"what has come is kept, the next call goes on"):
        fetched()
    assert fetched.part.read_bytes() == CONTENT[:1000]
    assert not fetched.target.exists()
    fetched()
    assert fetched.target.read_bytes() == CONTENT


def test_an_interruption_keeps_what_has_come(fetched: Fetched) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    fetched.served.ends_after = [1000]
    fetched.pauses = type("Pauses", (), {"append": staticmethod(interrupted)})()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        fetched()
    assert fetched.part.read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("beginning", [b"?" * 5000, b"?" * len(CONTENT), b"?" * (len(CONTENT) + 1)], ids=len)
def test_the_beginning_of_another_file_is_fetched_anew(fetched: Fetched, beginning: bytes) -> None:
    fetched.part.write_bytes(beginning)
    fetched()
    assert fetched.target.read_bytes() == CONTENT
    assert fetched.ranges[-1] is None


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT + b"?"], ids=["other", "longer"])
def test_another_file_never_gets_the_name(fetched: Fetched, content: bytes) -> None:
    fetched.served.files[NAME] = content
    with pytest.raises(UserError, match="is not the file that was pinned"):
        fetched()
    assert not fetched.target.exists()
    assert not fetched.part.exists()


def test_a_shorter_file_is_said(fetched: Fetched) -> None:
    fetched.served.files[NAME] = CONTENT[:100]
    with pytest.raises(UserError, match="could not be fetched: the connection ended after 100 of 10,240 bytes"):
        fetched()


def test_what_is_refused_is_not_asked_for_again(fetched: Fetched) -> None:
    del fetched.served.files[NAME]
    with pytest.raises(UserError, match="could not be fetched: HTTP 404"):
        fetched()
    assert len(fetched.ranges) == 1
