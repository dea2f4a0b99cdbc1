"""Which indexes are set up, and what they are asked."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.models.index import PYPI, Index, Offer
from tests.bench.models.serving import Served

FILE = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture
def machine(no_index: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without settings, in which pip's configuration files are looked for."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_CONFIG_FILE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "shared"))
    monkeypatch.setattr("bench.models.index.SHARED", tmp_path / "etc")
    monkeypatch.setattr("sys.prefix", str(tmp_path / "environment"))
    return tmp_path


def configure(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pip.conf"
    file.write_text(text)
    return file


def test_the_default_is_pypi(machine: Path) -> None:
    assert (Index().urls, Index().folders) == ([PYPI], [])


def test_the_nearest_file_wins_and_variables_win_over_files(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(
        machine / "etc", "[global]\nindex-url = https://etc/simple\nextra-index-url =\n  https://a/\n  https://b/\n"
    )
    assert Index().urls == ["https://etc/simple", "https://a/", "https://b/"]
    configure(machine / "config" / "pip", "[global]\nindex_url = https://user/simple\n[download]\nfind-links=~/w /v\n")
    assert Index().urls == ["https://user/simple", "https://a/", "https://b/"]
    assert Index().folders == [machine / "w", Path("/v")]
    own = configure(machine / "own", "[global]\nindex-url = https://own/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(own))  # in the place of the user's
    assert (Index().urls[0], Index().folders) == ("https://own/simple", [])
    monkeypatch.setenv("UV_INDEX_URL", "https://uv/simple")
    assert Index().urls[0] == "https://uv/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "named=https://uv-default/simple")
    assert Index().urls[0] == "https://uv-default/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://c/")
    assert Index().urls == ["https://pip/simple", "https://c/"]
    monkeypatch.setenv("PIP_NO_INDEX", "true")
    assert Index().urls == []
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert Index().urls == []


def test_a_broken_configuration_is_named(machine: Path) -> None:
    file = configure(machine / "config" / "pip", "index-url = https://user/simple\n")
    with pytest.raises(UserError, match=f"{file} is no configuration of pip: File contains no section headers"):
        Index()


def test_certificates_that_are_not_there_are_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CERT", "/nowhere.pem")
    with pytest.raises(UserError, match=r"The certificates /nowhere\.pem cannot be read: No such file"):
        Index()


def test_both_forms_are_understood(served: Served) -> None:
    served.files[FILE] = b"content"
    offer = Index().find("Tiny.Model==1.0", FILE)
    assert offer.url == f"{served.url.removesuffix('/simple')}/files/{FILE}"
    assert offer.sha256 == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert served.asked == [("/simple/tiny-model/", None)]
    with Index().open(offer.url, {}) as response:
        assert response.read() == b"content"


def test_what_an_index_lacks_another_may_have(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"not-an-address {served.url}/none {served.url}")
    served.files[FILE] = b"content"
    assert Index().find("tiny-model==1.0", FILE).url.endswith(f"/files/{FILE}")
    with pytest.raises(UserError) as caught:
        Index().find("tiny-model==1.0", FILE.replace("1.0", "2.0"))
    said = str(caught.value)
    assert "http://127.0.0.1:9/simple: Connection refused" in said
    assert f"{served.url}/none: " in said
    assert f"{served.url} does not list it" in said
    assert "\n" not in said


def test_an_answer_that_is_no_page_is_said(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Served, "page", lambda *_: ("application/json", b"[1]"))
    with pytest.raises(UserError, match="its answer is no page of a package index"):
        Index().find("tiny-model==1.0", FILE)


def test_the_key_goes_to_its_own_host_only(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.key = f"Basic {base64.b64encode(b'me:s@cret').decode()}"
    served.files[FILE] = b"content"
    monkeypatch.setenv("PIP_INDEX_URL", served.url.replace("//", "//me:s%40cret@"))
    offer = Index().find("tiny-model==1.0", FILE)
    assert "cret" not in offer.url
    with Index().open(offer.url, {}) as response:
        assert response.read() == b"content"
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    with pytest.raises(UserError, match="HTTP 401"):
        Index().find("tiny-model==1.0", FILE)


def test_a_folder_on_disk_is_an_index_too(no_index: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_bytes(b"content")
    monkeypatch.setenv("PIP_FIND_LINKS", f"https://somewhere/page {tmp_path.as_uri()}")
    assert Index().find("tiny-model==1.0", FILE) == Offer((tmp_path / FILE).as_uri())
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UserError, match=r"no index may be asked \(PIP_NO_INDEX\)"):
        Index().find("tiny-model==1.0", FILE)
    page = tmp_path / "simple" / "tiny-model"
    page.mkdir(parents=True)
    (page / "index.html").write_text(f'<a href="../../{FILE}">{FILE}</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{tmp_path.as_uri()}/simple/")
    offer = Index().find("tiny-model==1.0", FILE)
    with Index().open(offer.url, {"Range": "bytes=3-"}) as response:
        assert response.read() == b"content"
