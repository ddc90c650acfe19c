"""An S3-compatible server on loopback, behind a line that is slow and breaks now and then.

``python tests/object_store.py SET --out FILE`` measures what reading a set and training from it fetch.
"""

import http.client
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

STREAM, WORKERS = "--data.stream true", "--data.stream true --data.num_workers 2"
KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
PIECE = 4 * 1024


class Line(ThreadingHTTPServer):
    """A proxy before the server at `upstream` that fails, is slow, and counts."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.upstream, self.url = upstream, f"http://127.0.0.1:{self.server_port}"
        self.counting, self.band, self.closing = threading.Lock(), threading.Lock(), threading.Event()
        self.reset()

    def reset(self, *faults: str | None, bytes_per_s: float = 0, latency_s: float = 0, works_for: float = 1e9) -> None:
        """Set how the line behaves from now on.

        Args:
            faults: what becomes of one request after the other, round and round: None lets it through, "slow down"
                answers 503, "drop" closes the connection at once, "truncate" within the content, "hang" does nothing.
            bytes_per_s: bandwidth that all connections share; 0 does not limit it.
            latency_s: from a request to its answer.
            works_for: requests after which all are dropped.
        """
        self.faults, self.bytes_per_s, self.latency_s, self.works_for = (
            faults or (None,),
            bytes_per_s,
            latency_s,
            works_for,
        )
        self.failed: list[str] = []
        self.sent: list[tuple[str, int]] = []  # file and size of the content of each answer that was sent whole
        self.requests = 0

    def next_fault(self) -> str | None:
        with self.counting:
            fault = self.faults[self.requests % len(self.faults)] if self.requests < self.works_for else "drop"
            self.requests += 1
            if fault:
                self.failed.append(fault)
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away."""


class Connection(BaseHTTPRequestHandler):
    """One client's connection through the line."""

    server: Line
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet: else each answer waits 40 ms for an acknowledgement

    def do_GET(self) -> None:
        line, fault = self.server, self.server.next_fault()
        time.sleep(line.latency_s)
        if fault == "hang":
            line.closing.wait()
        if fault in ("hang", "drop"):
            self.close_connection = True
            return
        status, content = (503, SLOW_DOWN) if fault == "slow down" else self.ask()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "truncate":
            content, self.close_connection = content[: len(content) // 2], True
        for first in range(0, len(content), PIECE):
            piece = content[first : first + PIECE]
            if line.bytes_per_s:
                with line.band:
                    time.sleep(len(piece) / line.bytes_per_s)
            self.wfile.write(piece)
        if not fault and status == 200:
            with line.counting:
                line.sent.append((self.path.rpartition("/")[2], len(content)))

    def ask(self) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream)
        try:
            connection.request("GET", self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def log_message(self, *args: object) -> None:
        pass


class ObjectStore:
    """A server, and the line to it."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        host, port = server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.direct = boto3.session.Session().client("s3", endpoint_url=self.endpoint, **KEYS)
        self.line = Line((host, port))
        threading.Thread(target=self.line.serve_forever, daemon=True).start()

    def put(self, folder: Path, bucket: str, prefix: str) -> str:
        """Put a folder there, as `aws s3 cp --recursive` does, and return its URL."""
        self.direct.create_bucket(Bucket=bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                self.direct.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{bucket}/{prefix}"


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server and a line to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    store = ObjectStore(server)
    try:
        yield store
    finally:
        store.line.closing.set()
        store.line.shutdown()
        store.line.server_close()
        server.stop()


def measure(path: Path, *, out: Path | None = None, latency_s: float = 0.03) -> None:
    """Print and keep what comes over the line when a set is read, and when a small model is trained on it.

    Args:
        path: prepared set, a folder.
        out: file to write the figures to.
        latency_s: from a request to its answer.
    """
    from flashlab.btc.prepare import open_set
    from flashlab.btc.windows import part_windows

    set_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    options = "--data.context_length 256 --data.stride 8192 --data.batch_size 8 --model.width 16 --model.num_layers 1"
    steps = 2 * len(part_windows(open_set(path).manifest, "train", 256, 8192)) // 8  # an epoch, on one device
    with object_store() as store, tempfile.TemporaryDirectory() as runs:
        os.environ |= {name.upper(): value for name, value in KEYS.items() if name.startswith("aws")}
        os.environ |= {"AWS_DEFAULT_REGION": KEYS["region_name"], "AWS_ENDPOINT_URL": store.line.url}
        url = store.put(path, "lab", "set")
        read = {}
        open_set(path).bars()  # imports what it needs, untimed
        for name, place in (("folder_s", str(path)), ("storage_s", url)):
            store.line.reset(latency_s=latency_s)
            started = time.perf_counter()
            open_set(place).bars()
            read[name] = time.perf_counter() - started
        rows = []
        for devices, epochs, how in (
            (1, 1, ""), (1, 2, ""), (1, 1, STREAM), (1, 2, STREAM), (1, 2, WORKERS), (2, 2, ""), (2, 2, STREAM),
        ):  # fmt: skip
            store.line.reset(latency_s=latency_s)
            trainer = f"--trainer.accelerator cpu --trainer.devices {devices} --trainer.max_steps"
            command = f"train --data.path {url} {options} {how} {trainer} {epochs * steps // devices}"
            run = ["--run", f"{runs}/{len(rows)}"]
            subprocess.run([sys.executable, "-m", "flashlab", *command.split(), *run], check=True)
            fetched = sum(size for _, size in store.line.sent)
            rows.append({"devices": devices, "epochs": epochs, "options": how, "requests": len(store.line.sent)})
            rows[-1]["times_the_set"] = fetched / set_bytes
            print(rows[-1], flush=True)
    figures = {"set_bytes": set_bytes, "latency_s": latency_s} | read | {"rows": rows}
    print({name: value for name, value in figures.items() if name != "rows"})
    if out:
        out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(measure)
