import base64
import hashlib
import io
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from kagglesdk import kaggle_env

from flashlab.btc import fetch as fetch_module
from flashlab.btc.fetch import FILE
from flashlab.btc.simulate import simulate_bars
from flashlab.cli import main

CHUNK = 4096


class Kaggle(ThreadingHTTPServer):
    """Plays the three requests of a download: current version, redirect to the storage, the file with ranges."""

    daemon_threads = True

    def __init__(self, body: bytes, name: str = FILE):
        super().__init__(("127.0.0.1", 0), Answer)
        self.body, self.name = body, name
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.sent = body  # differs from `body` when the network corrupts it
        self.cuts: list[int] = []  # bytes after which the next responses break off
        self.status = 200
        self.page = b"{}"  # of a status that is not 200, or of the version request when it is set
        self.ranges: list[str | None] = []  # what was asked for, one per file request


class Answer(BaseHTTPRequestHandler):
    server: Kaggle

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status != 200 or self.server.page != b"{}":
            self.reply(self.server.status, self.server.page, {"Content-Type": "text/html"})
        elif self.path.endswith("/GetDataset"):
            self.reply(200, b'{"currentVersionNumber": 7}', {"Content-Type": "application/json"})
        elif self.path.endswith("/DownloadDataset"):
            self.reply(302, b"", {"Location": f"{self.server.url}/storage/{self.server.name}"})

    def do_GET(self) -> None:
        self.server.ranges.append(asked := self.headers["Range"])
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        md5 = base64.b64encode(hashlib.md5(self.server.body).digest()).decode()
        headers = {"Accept-Ranges": "bytes", "x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"}
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.reply(206 if asked else 200, self.server.sent[start:], headers, cut)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True


@pytest.fixture(scope="module")
def csv_bytes() -> bytes:
    return simulate_bars(days=3, seed=0).to_csv(index=False).encode()


@pytest.fixture
def kaggle(csv_bytes, monkeypatch, tmp_path):
    server = Kaggle(csv_bytes)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.0)
    monkeypatch.setattr("kagglehub.clients.CHUNK_SIZE", CHUNK)  # what it stores at once, 1 MiB without this
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", "restored after the test")
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path):
    """A folder with an earlier download in it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE).write_text("earlier")
    return tmp_path / "data"


def run_fetch(out, capsys) -> tuple[int, str, list[str]]:
    """Run the command; return its code, its output, and its lines on stderr without the progress bar."""
    code = main(["data", "fetch", "--out", str(out)])
    captured = capsys.readouterr()
    lines = [line for line in re.split(r"[\r\n]+", captured.err) if line.startswith(("flashlab", "the ", "what "))]
    return code, captured.out, lines


@pytest.mark.parametrize("packed", [False, True], ids=["csv", "zipped by the storage"])
def test_downloads_replaces_and_says_what_is_next(kaggle, csv_bytes, out, capsys, packed):
    if packed:
        with zipfile.ZipFile(archive := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(FILE, csv_bytes)
        kaggle.name, kaggle.body = f"{FILE}.zip", archive.getvalue()
        kaggle.sent = kaggle.body
    code, said, _ = run_fetch(out, capsys)
    assert code == 0
    assert (out / FILE).read_bytes() == csv_bytes
    assert list(out.iterdir()) == [out / FILE]
    assert f"make train DATA={out / FILE}" in said
    assert "from 2024-12-29T00:0" in said


def test_a_cut_connection_is_resumed_in_the_same_run(kaggle, csv_bytes, out, capsys):
    kaggle.cuts = [100_000]
    code, _, lines = run_fetch(out, capsys)
    assert code == 0
    assert (out / FILE).read_bytes() == csv_bytes
    # Each attempt asks for the file; the second sees that it can go on and asks again for the rest.
    assert kaggle.ranges == [None, None, f"bytes={100_000 // CHUNK * CHUNK}-"]
    assert len(lines) == 1
    assert "trying again" in lines[0]


def test_a_download_given_up_is_resumed_by_the_next_run(kaggle, csv_bytes, out, capsys, monkeypatch):
    monkeypatch.setattr(fetch_module, "ATTEMPTS", 1)
    kaggle.cuts = [100_000]
    code, _, lines = run_fetch(out, capsys)
    assert code == 2
    assert len(lines) == 1
    assert "cut" in lines[0]
    assert "run the command again" in lines[0]
    assert (out / FILE).read_text() == "earlier"

    assert run_fetch(out, capsys)[0] == 0
    assert kaggle.ranges[-1] == f"bytes={100_000 // CHUNK * CHUNK}-"
    assert (out / FILE).read_bytes() == csv_bytes


def test_a_corrupted_body_is_noticed(kaggle, csv_bytes, out, capsys):
    damaged = np.frombuffer(csv_bytes, np.uint8).copy()
    damaged[5000] ^= 1
    kaggle.sent = damaged.tobytes()
    code, _, lines = run_fetch(out, capsys)
    assert code == 2
    assert "damaged" in lines[-1]
    assert (out / FILE).read_text() == "earlier"
    kaggle.sent = csv_bytes
    assert run_fetch(out, capsys)[0] == 0
    assert (out / FILE).read_bytes() == csv_bytes


@pytest.mark.parametrize(
    ("status", "page", "said"),
    [
        (403, b"{}", "KAGGLE_API_TOKEN"),
        (404, b"{}", "moved or renamed"),
        (503, b"{}", "HTTP 503"),
        (200, b"<html>Please log in to the hotel network</html>", "proxy"),
    ],
)
def test_what_kaggle_refuses_is_one_line(kaggle, out, capsys, status, page, said):
    kaggle.status, kaggle.page = status, page
    code, _, lines = run_fetch(out, capsys)
    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert (out / FILE).read_text() == "earlier"


def test_no_network(kaggle, out, capsys, monkeypatch):
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    code, _, lines = run_fetch(out, capsys)
    assert code == 2
    assert "check the network" in lines[-1]
    assert (out / FILE).read_text() == "earlier"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"date,price\n2024-01-01,1\n", "has no column 'Timestamp'"),
        (b"Timestamp,Open,High,Low,Close,Volume\n1700000000,0,0,0,0,0\n", "not one of its 1 rows"),
        (b"", "is empty"),
    ],
)
def test_another_file_than_expected_is_refused(kaggle, out, capsys, body, said):
    kaggle.body = kaggle.sent = body
    code, _, lines = run_fetch(out, capsys)
    assert code == 2
    assert said in lines[-1]
    assert (out / FILE).read_text() == "earlier"
    assert list(out.iterdir()) == [out / FILE]


def test_a_file_stands_where_the_folder_should_be(kaggle, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    code, _, lines = run_fetch(tmp_path / "taken", capsys)
    assert code == 2
    assert "cannot write" in lines[-1]
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_full_disk_is_one_line(kaggle, out, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kagglehub.clients._download_file", refuse)
    code, _, lines = run_fetch(out, capsys)
    assert code == 2
    assert "No space left on device; free space" in lines[-1]
    assert (out / FILE).read_text() == "earlier"
