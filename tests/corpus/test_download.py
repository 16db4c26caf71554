"""A file arrives whole from a server that cuts, lies, changes its mind and is slow, or a sentence says why not."""

from __future__ import annotations

import hashlib
import random
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import pytest
from rich.console import Console

from megallama.corpus.fetching import download as module
from megallama.corpus.fetching.download import Digest, Wanted, download
from megallama.corpus.fetching.fetch import Outcome, fetch, wanted_files
from megallama.corpus.fetching.fetch_progress import FetchProgress
from megallama.errors import UserError
from tests.corpus.serving import Served, serving

CONTENT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.0)


def fetched(served: Served, folder: Path, sha256: str | None = None, *, force: bool = False) -> Outcome:
    wanted = wanted_files(f"{served.url}/text.jsonl?key=1", (), None, sha256)
    return fetch(wanted, folder, FetchProgress(Console(quiet=True)), force=force)


def is_whole(folder: Path, content: bytes = CONTENT) -> bool:
    return (
        sorted(path.name for path in folder.iterdir()) == ["fetched.json", "text.jsonl"]
        and (folder / "text.jsonl").read_bytes() == content
    )


def test_a_connection_that_is_cut_is_continued_where_it_ended(tmp_path: Path) -> None:
    with serving(Served(CONTENT, cuts=[100, 70_000, 0, 1, 150_000])) as served:
        fetched(served, tmp_path, SHA256)
    assert is_whole(tmp_path)
    assert served.requests == ["", *(f"bytes={n}-" for n in (100, 70_100, 70_100, 70_101, 220_101))]


def test_without_ranges_all_comes_again(tmp_path: Path) -> None:
    with serving(Served(CONTENT, ranges=False, cuts=[100, 50, 200_000])) as served:
        fetched(served, tmp_path)
    assert is_whole(tmp_path)


def test_without_a_hash_or_a_state_no_part_is_continued(tmp_path: Path) -> None:
    other = CONTENT[::-1]
    with serving(Served(other, etag=None, cuts=[100_000], changes=[(CONTENT, "")])) as served:
        fetched(served, tmp_path)
    assert is_whole(tmp_path)
    assert served.requests == ["", "bytes=100000-", ""]


@pytest.mark.parametrize("etag", ['"two"', 'W/"two"'])
def test_a_file_that_changes_between_tries_is_never_mixed(tmp_path: Path, etag: str) -> None:
    other = CONTENT[::-1]
    weak = etag.replace("two", "one")
    with serving(Served(other, etag=weak, cuts=[100_000], changes=[(CONTENT, etag)])) as served:
        fetched(served, tmp_path)
    assert is_whole(tmp_path)


def test_a_part_of_another_file_is_found_by_the_hash_and_fetched_again(tmp_path: Path) -> None:
    with serving(Served(CONTENT, cuts=[100_000] + [0] * module.TRIES)) as served:
        with pytest.raises(UserError, match=r"6 tries in a row ended after 100,000 of 300,000 bytes"):
            fetched(served, tmp_path, SHA256)
        part = tmp_path / "text.jsonl.part"
        part.write_bytes(bytes(100_000))  # a disk that lost what it had not written yet
        fetched(served, tmp_path, SHA256)
    assert is_whole(tmp_path)


def test_a_server_that_falls_silent_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 1.0)
    gates = [threading.Event(), threading.Event()]
    with serving(Served(CONTENT, gates=[*gates])) as served:
        fetched(served, tmp_path)
        for gate in gates:
            gate.set()
    assert is_whole(tmp_path)
    assert served.requests == ["", "bytes=150000-", "bytes=225000-"]


def test_a_second_fetch_into_a_folder_is_refused(tmp_path: Path) -> None:
    gate = threading.Event()
    with serving(Served(CONTENT, gates=[gate])) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(fetched, served, tmp_path)
        served.halfway.wait()
        try:
            with pytest.raises(UserError, match=r"--output .* is in use by process .*choose another --output"):
                fetched(served, tmp_path)
        finally:
            gate.set()
        first.result()
    assert is_whole(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_size_that_is_too_large_ends_in_a_sentence(tmp_path: Path, ranges: bool) -> None:
    with (
        serving(Served(CONTENT, promised=400_000, ranges=ranges)) as served,
        pytest.raises(UserError, match=r"cannot be fetched: 6 tries in a row ended"),
    ):
        fetched(served, tmp_path)
    assert not (tmp_path / "text.jsonl").exists()


def test_a_size_that_is_too_small_is_found_by_the_hash(tmp_path: Path) -> None:
    with (
        serving(Served(CONTENT, promised=1_000)) as served,
        pytest.raises(UserError, match=f"another sha256 hash than {SHA256}"),
    ):
        fetched(served, tmp_path, SHA256)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_size_that_is_not_that_of_the_listing_is_refused(tmp_path: Path) -> None:
    with (
        serving(Served(CONTENT)) as served,
        pytest.raises(UserError, match="promises 300,000 bytes, and its listing 300,001"),
    ):
        download(Wanted(served.url, "a", 300_001, Digest("sha256", SHA256)), tmp_path / "a", lambda there, size: None)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "not for everybody"), (403, "not for everybody"), (404, "does not exist")]
)
def test_what_a_server_refuses_is_said_at_once(tmp_path: Path, status: int, words: str) -> None:
    with serving(Served(CONTENT, status=status)) as served, pytest.raises(UserError, match=f"{words}.*HTTP {status}"):
        fetched(served, tmp_path)
    assert len(served.requests) == 1


def test_a_server_that_is_not_there_is_tried_again_and_named(tmp_path: Path) -> None:
    with serving(Served(CONTENT)) as served:
        pass
    with pytest.raises(UserError, match=r"before the first byte \(Connection refused\); check the network"):
        fetched(served, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("served", "words"),
    [
        (Served(CONTENT, kind="text/html; charset=utf-8"), "answers with a web page"),
        (Served(CONTENT, promised=10**4000), "comes without its size"),
        (Served(CONTENT, promised=10**15), "the disk of --output .* is full"),
        (Served(b"", redirect="ftp://127.0.0.1/a"), "it leads to ftp://127.0.0.1/a, by ftp"),
        (Served(b"", redirect="/again"), "infinite loop"),
    ],
)
def test_what_is_not_the_file_is_said_at_once(tmp_path: Path, served: Served, words: str) -> None:
    with serving(served), pytest.raises(UserError, match=words) as refused:
        fetched(served, tmp_path / "new")
    assert "\\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_a_redirection_does_not_give_https_up() -> None:
    request = urllib.request.Request("https://host/a")
    with pytest.raises(urllib.error.HTTPError, match="by http"):
        module._Redirects().redirect_request(request, None, 302, "Found", Message(), "http://host/a")


def test_a_proxy_that_answers_with_all_of_it_is_believed(tmp_path: Path) -> None:
    with serving(Served(CONTENT, status=203, ranges=False, cuts=[100])) as served:
        fetched(served, tmp_path)
    assert is_whole(tmp_path)


def test_a_file_has_its_name_after_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, digest: Digest | None) -> str:
        raise KeyboardInterrupt

    with serving(Served(CONTENT)) as served:
        with monkeypatch.context() as patch:
            patch.setattr(module, "checked", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetched(served, tmp_path)
        assert fetched(served, tmp_path).new == 1  # and not refused, as another file under that name
        assert len(served.requests) == 1
    assert is_whole(tmp_path)


@pytest.mark.parametrize(
    "note", ['{"url": "URL", "size": "x", "etag": 1, "modified": []}', '{"url": "URL"}', "[" * 100_000]
)
def test_a_damaged_note_costs_a_new_start(tmp_path: Path, note: str) -> None:
    with serving(Served(CONTENT)) as served:
        (tmp_path / "text.jsonl.part").write_bytes(b"part")
        (tmp_path / "text.jsonl.part.json").write_text(note.replace("URL", f"{served.url}/text.jsonl?key=1"))
        fetched(served, tmp_path)
    assert is_whole(tmp_path)
    assert served.requests == [""]


@pytest.mark.parametrize("record", ["", "[]", '{"a": 1}', "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path: Path, record: str) -> None:
    (tmp_path / "fetched.json").write_text(record)
    with pytest.raises(UserError, match=r"fetched\.json is damaged; remove it"):
        fetch([], tmp_path, FetchProgress(Console(quiet=True)))


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    with serving(Served(CONTENT, status=503)) as served, pytest.raises(UserError, match="HTTP 503"):
        fetched(served, tmp_path)
    assert len(served.requests) == module.TRIES


def test_what_authorizes_stays_on_its_host(tmp_path: Path) -> None:
    with serving(Served(CONTENT)) as elsewhere, serving(Served(b"", redirect=f"{elsewhere.url}/blob")) as served:
        wanted = Wanted(served.url, "a", len(CONTENT), Digest("sha256", SHA256), "Bearer secret")
        download(wanted, tmp_path / "a", lambda there, size: None)
    assert served.headers[0]["authorization"] == "Bearer secret"
    assert "authorization" not in elsewhere.headers[0]


def test_a_fetched_file_is_kept_and_another_is_not_replaced(tmp_path: Path) -> None:
    with serving(Served(CONTENT)) as served:
        assert fetched(served, tmp_path).new == 1
        assert fetched(served, tmp_path).new == 0
        assert len(served.requests) == 1
        (tmp_path / "text.jsonl").write_bytes(b"mine")
        with pytest.raises(UserError, match=r"is not the file of .*--force"):
            fetched(served, tmp_path)
        assert (tmp_path / "text.jsonl").read_bytes() == b"mine"
        assert fetched(served, tmp_path, force=True).new == 1
    assert is_whole(tmp_path)


def test_a_name_that_leads_out_of_the_folder_is_refused() -> None:
    for url in ("https://host/", "https://host", "https:///a.txt", "https://host/%2e%2e"):
        with pytest.raises(UserError, match=r"names no file|leads out of the output folder"):
            wanted_files(url, (), None, None)
    for url in ("https://host/.lock", "https://host/%66etched.json"):
        with pytest.raises(UserError, match=r"which a fetch keeps for itself"):
            wanted_files(url, (), None, None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/a.txt", "http://127.0.0.1/a b.txt", "http://127.0.0.1/é.txt"])
def test_what_is_no_address_is_said_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=r"is no address .*%XX"):
        fetch(wanted_files(url, (), None, None), tmp_path, FetchProgress(Console(quiet=True)))


def test_a_disk_that_is_too_small_or_full_is_named(tmp_path: Path) -> None:
    wanted = Wanted("http://127.0.0.1:9/a", "a", 1 << 60, Digest("sha256", SHA256))
    with pytest.raises(UserError, match=r"needs 1,152,921,504\.61 GB and has .* free"):
        fetch([wanted], tmp_path, FetchProgress(Console(quiet=True)))
    with serving(Served(CONTENT)) as served:
        (tmp_path / "text.jsonl.part").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"the disk of --output .* is full"):
            fetched(served, tmp_path)
