"""Archives: found where the user put them, never trusted unverified, downloads resumed."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dynat.data import download
from dynat.data.download import fetch
from dynat.errors import UserError

NAME = "images.tar.gz"
PAYLOAD = np.random.default_rng(0).bytes(200_000)
OTHER = np.random.default_rng(1).bytes(150_000)
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"
MD5 = hashlib.md5(PAYLOAD).hexdigest()
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.body``; what it does wrong is set on the server."""

    def do_GET(self) -> None:
        site = self.server.site  # type: ignore[attr-defined]
        asked = self.headers["Range"]
        site.requests.append((self.path, asked))
        if site.stall:
            site.released.wait(5)
        if site.status != 200:
            return self.send_error(site.status)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and site.ranges else 0
        if start >= len(site.body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(site.body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.body) - 1}/{len(site.body)}")
        self.end_headers()
        self.wfile.write(site.body[start:][: site.cut])
        if site.dies:
            site.status = 503
        return None

    def log_message(self, *_: object) -> None:
        """Keep the tests' output quiet."""


Serve = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNAT_DATA_MIRROR", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(body: bytes = PAYLOAD, **faults: object) -> SimpleNamespace:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        defaults = {"ranges": True, "cut": None, "dies": False, "stall": False, "status": 200}
        site = SimpleNamespace(body=body, requests=[], released=threading.Event(), **{**defaults, **faults})
        site.url = f"http://127.0.0.1:{server.server_port}/data"
        server.site = site  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return site

    yield start
    for server, thread in servers:
        server.site.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
        thread.join()


def part(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        fetch(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_archive_in_the_mirror_folder_is_used_in_place_before_any_other(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, site, destination = tmp_path / "own", serve(), tmp_path / "data" / NAME
    own.mkdir()
    (own / NAME).write_bytes(PAYLOAD)
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(own))
    assert fetch(NAME, MD5, SHA256, [site.url], destination) == own / NAME
    assert site.requests == []
    assert not destination.parent.exists()


def test_relative_mirror_folder_is_relative_to_the_dvc_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / NAME).write_bytes(PAYLOAD)
    (tmp_path / "repository" / "experiment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "repository" / "experiment")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    monkeypatch.setenv("DYNAT_DATA_MIRROR", "../shared")
    assert fetch(NAME, MD5, None, [], tmp_path / NAME).read_bytes() == PAYLOAD


@pytest.mark.parametrize("found", [OTHER, PAYLOAD[:-1], b""], ids=["wrong", "truncated", "empty"])
def test_archive_with_wrong_hash_is_refused_with_expected_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bytes
) -> None:
    (tmp_path / NAME).write_bytes(found)
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path))
    message = refused(NAME, MD5, None, [], tmp_path / "data" / NAME)
    assert MD5 in message
    assert hashlib.md5(found).hexdigest() in message
    assert f"{len(found)} bytes" in message
    assert "HTML" not in message


def test_html_page_in_place_of_an_archive_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).write_bytes(HTML)
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path))
    assert "looks like an HTML page" in refused(NAME, MD5, None, [], tmp_path / "data" / NAME)


def test_both_hashes_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(PAYLOAD)
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path))
    assert SHA256 in refused(NAME, MD5, "0" * 64, [], tmp_path / "data" / NAME)


def test_missing_archive_names_the_places_and_the_variable(tmp_path: Path, serve: Serve) -> None:
    site = serve(status=404)
    message = refused(NAME, MD5, None, [site.url], tmp_path / NAME)
    for part_of_it in (
        NAME,
        "DYNAT_DATA_MIRROR (unset)",
        str(tmp_path / NAME),
        site.url,
        "HTTP Error 404",
        "set DYN",
    ):
        assert part_of_it in message


def test_missing_mirror_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path / "typo"))
    assert "typo" in refused(NAME, MD5, None, [], tmp_path / NAME)


def test_download_is_verified_and_leaves_only_the_archive(tmp_path: Path, serve: Serve) -> None:
    site, destination = serve(), tmp_path / "data" / NAME
    assert fetch(NAME, MD5, SHA256, [site.url + "/"], destination) == destination
    assert destination.read_bytes() == PAYLOAD
    assert not part(destination).exists()
    assert site.requests == [(f"/data/{NAME}", None)]


def test_mirror_url_of_the_user_comes_before_the_others(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = serve(), serve()
    monkeypatch.setenv("DYNAT_DATA_MIRROR", own.url)
    fetch(NAME, MD5, None, [other.url], tmp_path / NAME)
    assert len(own.requests) == 1
    assert other.requests == []


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"body": HTML}, {"body": OTHER}, {"body": PAYLOAD[:-9]}, {"body": b""}],
    ids=["500", "html", "wrong", "truncated", "empty"],
)
def test_next_mirror_is_asked_when_one_fails(tmp_path: Path, serve: Serve, fault: dict[str, object]) -> None:
    first, second, third = serve(**fault), serve(), serve()
    fetch(NAME, MD5, None, [first.url, second.url, third.url], tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == PAYLOAD
    assert (len(first.requests) > 0, len(second.requests), len(third.requests)) == (True, 1, 0)


def test_silent_mirror_is_left_after_the_timeout(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    fetch(NAME, MD5, None, [serve(stall=True).url, serve().url], tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == PAYLOAD


@pytest.mark.parametrize("body", [OTHER, PAYLOAD[:-9]], ids=["wrong", "truncated"])
def test_wrong_download_is_refused_and_nothing_of_it_stays(tmp_path: Path, serve: Serve, body: bytes) -> None:
    destination = tmp_path / NAME
    message = refused(NAME, MD5, None, [serve(body).url], destination)
    assert MD5 in message
    assert hashlib.md5(body).hexdigest() in message
    assert f"{len(body)} bytes" in message
    assert not destination.exists()
    assert not part(destination).exists()


def test_dropped_connection_is_resumed_where_it_broke(tmp_path: Path, serve: Serve) -> None:
    site = serve(cut=60_000)
    fetch(NAME, MD5, None, [site.url], tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == PAYLOAD
    assert [asked for _, asked in site.requests] == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-"]


@pytest.mark.parametrize("ranges", [True, False], ids=["Range", "Range ignored"])
def test_interrupted_download_is_kept_and_a_later_call_resumes_it(
    tmp_path: Path, serve: Serve, ranges: bool
) -> None:
    destination = tmp_path / NAME
    message = refused(NAME, MD5, None, [serve(cut=70_000, dies=True).url], destination)
    assert "run again to resume" in message
    assert not destination.exists()
    assert part(destination).read_bytes() == PAYLOAD[:70_000]
    site = serve(ranges=ranges)
    fetch(NAME, MD5, None, [site.url], destination)
    assert destination.read_bytes() == PAYLOAD
    assert site.requests == [(f"/data/{NAME}", "bytes=70000-")]
    assert not part(destination).exists()


def test_html_page_does_not_cost_what_was_downloaded(tmp_path: Path, serve: Serve) -> None:
    assert "an HTML page" in refused(NAME, MD5, None, [serve(HTML).url], tmp_path / NAME)
    assert not part(tmp_path / NAME).exists()
    part(tmp_path / NAME).write_bytes(PAYLOAD[:90_000])
    refused(NAME, MD5, None, [serve(HTML, ranges=False).url], tmp_path / NAME)
    assert part(tmp_path / NAME).read_bytes() == PAYLOAD[:90_000]


@pytest.mark.parametrize("size", [10, len(PAYLOAD), len(PAYLOAD) + 5])
@pytest.mark.parametrize("ranges", [True, False], ids=["Range", "Range ignored"])
def test_corrupt_part_is_thrown_away_and_begun_anew(
    tmp_path: Path, serve: Serve, size: int, ranges: bool
) -> None:
    part(tmp_path / NAME).write_bytes(bytes(size))
    fetch(NAME, MD5, None, [serve(ranges=ranges).url], tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == PAYLOAD


def test_download_killed_before_its_rename_is_finished_without_another(tmp_path: Path, serve: Serve) -> None:
    site = serve()
    part(tmp_path / NAME).write_bytes(PAYLOAD)
    fetch(NAME, MD5, None, [site.url], tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == PAYLOAD
    assert site.requests == [(f"/data/{NAME}", f"bytes={len(PAYLOAD)}-")]


def test_present_archive_is_used_without_a_request_once_verified(tmp_path: Path, serve: Serve) -> None:
    site = serve()
    (tmp_path / NAME).write_bytes(PAYLOAD)
    assert fetch(NAME, MD5, None, [site.url], tmp_path / NAME) == tmp_path / NAME
    assert site.requests == []


def test_present_archive_that_differs_is_refused_and_not_overwritten(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / NAME).write_bytes(OTHER)
    assert hashlib.md5(OTHER).hexdigest() in refused(NAME, MD5, None, [serve().url], tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == OTHER


def test_two_calls_at_once_download_once(tmp_path: Path, serve: Serve) -> None:
    site = serve(stall=True)  # so that all of them are there before the first byte is
    threading.Timer(0.5, site.released.set).start()
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: fetch(NAME, MD5, None, [site.url], tmp_path / NAME), range(4)))
    assert paths == [tmp_path / NAME] * 4
    assert (tmp_path / NAME).read_bytes() == PAYLOAD
    assert len(site.requests) == 1


def test_nothing_is_downloaded_that_could_not_be_verified(tmp_path: Path, serve: Serve) -> None:
    site = serve()
    assert "without md5 or sha256" in refused(NAME, None, None, [site.url], tmp_path / NAME)
    assert site.requests == []


def test_mirror_that_is_no_web_address_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / NAME).write_bytes(PAYLOAD)
    message = refused(NAME, MD5, None, [f"file://{tmp_path}/there"], tmp_path / NAME)
    assert "not an http(s) URL" in message


def test_folder_that_cannot_be_written_is_named(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "file").write_bytes(b"")
    destination = tmp_path / "file" / NAME
    assert str(destination) in refused(NAME, MD5, None, [serve().url], destination)
