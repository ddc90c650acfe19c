"""Training from an S3-compatible server, over a line that is slow and fails now and then."""

import gc
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import pytest
import torch

from flashlab import object_storage
from flashlab.btc.prepare import open_set
from flashlab.btc.report import read_curves
from flashlab.btc.windows import part_windows
from flashlab.cli import main
from flashlab.errors import UserError
from flashlab.object_storage import open_storage
from object_store import KEYS, object_store
from trainings import only_line

TINY = (
    "--data.context_length 32 --data.stride 16 --data.batch_size 4 --model.width 16 --model.num_layers 1 "
    "--optimizer.lr 0.01 --optimizer.warmup_steps 3 --trainer.max_steps 22 --trainer.val_every_n_steps 8 "
    "--trainer.checkpoint_every_n_steps 3 --trainer.log_every_n_steps 1 --trainer.accelerator cpu"
)
HOW = {
    "memory": "",
    "stream": "--data.stream true",
    "stream, 2 workers": "--data.stream true --data.num_workers 2",
}
FAULTS = ("slow down", None, "drop", None, "truncate", None)


@pytest.fixture(scope="module")
def server():
    with object_store() as store:
        yield store


@pytest.fixture
def temporary(monkeypatch):
    """A folder for temporary files whose name is short: loaders put sockets there, with paths of at most 107 bytes."""
    with TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


@pytest.fixture
def store(server, monkeypatch, temporary):
    """The server as the environment's, over a line without faults; waits are short, and what stays behind is seen."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.line.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.01)
    server.line.reset()
    return server


@pytest.fixture(scope="module")
def url(server, many_blocks):
    return server.put(many_blocks, "lab", "sets/bars")


@pytest.fixture
def own_url(store, many_blocks, request):
    """A set to damage."""
    return store.put(many_blocks, "lab", f"own/{abs(hash(request.node.name))}")


@pytest.fixture
def train(url, temporary, tmp_path):
    """`flashlab train` on the set in object storage; nothing may stay behind of what it fetched."""

    def train(*options, path=url, run=tmp_path / "run"):
        code = main(["train", "--data.path", str(path), *TINY.split(), "--run", str(run), *" ".join(options).split()])
        gc.collect()
        assert not list(temporary.glob("flashlab-*"))
        return code

    return train


@pytest.fixture(scope="module")
def reference(many_blocks, tmp_path_factory):
    """What a run on the same set in a local folder comes to."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert main(["train", "--data.path", str(many_blocks), *TINY.split(), "--run", str(run)]) == 0
    return outcome(run)


def outcome(run: Path) -> tuple[dict, dict]:
    """Weights and losses."""
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    curves = read_curves(run)
    return (
        {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        {name: [list(map(float, axis)) for axis in curves[name]] for name in ("train/loss", "val/loss")},
    )


# --- training goes through, and comes to the same


@pytest.mark.parametrize("how", HOW)
def test_training_over_a_bad_line_is_training_from_a_folder(store, train, reference, how, tmp_path, capsys):
    store.line.reset(*FAULTS, bytes_per_s=500_000, latency_s=0.01)
    assert train(HOW[how]) == 0
    assert outcome(tmp_path / "run") == reference
    assert set(store.line.failed) == {"slow down", "drop", "truncate"}
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_two_processes_train_over_a_bad_line_as_from_a_folder(store, url, temporary, many_blocks, tmp_path):
    outcomes = []
    for path in (url, many_blocks):
        store.line.reset(*FAULTS, bytes_per_s=500_000)
        run = tmp_path / ("remote" if path == url else "local")
        options = f"{TINY} {HOW['stream, 2 workers']} --trainer.devices 2 --run {run}".split()
        command = [sys.executable, "-m", "flashlab", "train", "--data.path", str(path), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert bool(store.line.failed) == (path == url)
        outcomes.append(outcome(run))
    assert outcomes[0] == outcomes[1]
    assert not list(temporary.glob("flashlab-*"))


def test_memory_is_the_folder_s_bars_and_costs_the_set_once(store, url, train, many_blocks):
    bars = open_set(url).bars()
    assert bars.values.tobytes() == open_set(many_blocks).bars().values.tobytes()
    assert bars.minute.tobytes() == open_set(many_blocks).bars().minute.tobytes()
    store.line.reset()
    assert train() == 0
    files = [path for path in many_blocks.rglob("*") if path.is_file() and path.name != ".lock"]
    assert sorted(store.line.sent) == sorted((path.name, path.stat().st_size) for path in files)


@pytest.mark.parametrize(("how", "readers"), [("stream", 2), ("stream, 2 workers", 3)])
def test_a_streaming_process_fetches_a_chunk_once_for_a_part(store, url, train, many_blocks, how, readers):
    """In three epochs."""
    windows = 2 * len(part_windows(open_set(url).manifest, "train", 32, 64))
    store.line.reset()
    assert train(HOW[how], f"--data.stride 64 --trainer.max_steps {3 * windows // 4}") == 0
    fetched = Counter(name for name, _ in store.line.sent if name.endswith(".bin"))
    assert fetched.keys() == {path.name for path in many_blocks.rglob("*.bin")} - {"chunk-0-6.bin"}  # the test part's
    assert max(fetched.values()) == readers  # that of a chunk with bars of both parts; of the others, one less
    assert sorted(fetched.values())[-2] == readers - 1
    size = sum(path.stat().st_size for path in many_blocks.rglob("*.bin"))
    print(f"{how}: {sum(size for _, size in store.line.sent) / size:.2f} times the set, {dict(fetched)}")


# --- it does not go through: one line, in bounded time


def test_a_server_that_stays_away_is_given_up_after_a_minute(store, url, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(object_storage.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(object_storage.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"^cannot fetch s3://lab/sets/bars/manifest.json: still failing after 60 s \("):
        open_set(url)
    assert clock[0] == pytest.approx(60)
    assert "waiting for s3://lab/sets/bars/manifest.json (Could not connect to the endpoint" in only_line(capsys)


@pytest.mark.parametrize("fault", ["slow down", "drop", "truncate", "hang"])
def test_a_fault_that_lasts_is_one_line(store, train, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.5)
    monkeypatch.setattr(object_storage, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.2)
    store.line.reset(fault)
    assert train() == 2
    assert "cannot fetch s3://lab/sets/bars/manifest.json: still failing after 0.5 s (" in capsys.readouterr().err
    assert 2 <= store.line.requests < 10
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["stream", "stream, 2 workers"])
def test_a_server_lost_while_training_is_one_line_and_the_run_resumes(
    store, train, reference, how, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.2)
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # till idle workers are terminated
    works_for = 1 + (1 + 6) * (2 if how.endswith("workers") else 1)  # all that the training part takes
    store.line.reset(works_for=works_for)
    assert train(HOW[how]) == 2
    line = only_line(capsys)
    assert line.startswith("flashlab: error: cannot fetch s3://lab/sets/bars/bars-")
    assert "still failing after 0.2 s (" in line
    store.line.reset()
    assert train(HOW[how], "--resume") == 0
    assert "resumed from" in capsys.readouterr().out
    assert outcome(tmp_path / "run")[0] == reference[0]


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("s3://nowhere/set", r"nowhere/set/manifest.json: The specified bucket does not exist \(NoSuchBucket\); check"),
        ("s3://lab/nothing/", r"lab/nothing/manifest.json: The specified key does not exist \(NoSuchKey\); check"),
        ("s3://No_Bucket!/set", "set/manifest.json: Parameter validation failed: Invalid bucket name .*; check"),
        ("s4://lab/set", "s4://lab/set/manifest.json: it is empty, or not a URL that litdata reads"),
    ],
)
def test_what_is_not_there_is_one_line(store, url, train, path, complaint, tmp_path, capsys):
    assert train(path=path) == 2
    line = only_line(capsys)
    assert line.startswith("flashlab: error: cannot fetch s")
    assert re.search(complaint, line)
    assert store.line.requests <= 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def guarded(store):
    """The server asks who is there; gives the keys of somebody who may read."""
    iam = boto3.session.Session().client("iam", endpoint_url=store.endpoint, **KEYS)
    iam.create_user(UserName="reader")
    keys = iam.create_access_key(UserName="reader")["AccessKey"]
    allowed = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::lab/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)

    def after(requests: bytes) -> None:
        asked = urllib.request.Request(
            f"{store.endpoint}/moto-api/reset-auth", requests, {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(asked).close()

    after(b"0")
    yield {"AWS_ACCESS_KEY_ID": keys["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": keys["SecretAccessKey"]}
    after(b"inf")


def test_wrong_credentials_are_one_line(guarded, url, monkeypatch):
    def complaint() -> str:
        with pytest.raises(UserError) as caught:
            open_set(url)
        return str(caught.value)

    for name, value in guarded.items():
        monkeypatch.setenv(name, value)
    assert open_set(url).manifest
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "SignatureDoesNotMatch); check credentials (AWS_ACCESS_KEY_ID, " in complaint()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "InvalidAccessKeyId); check credentials (AWS_ACCESS_KEY_ID, " in complaint()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "Unable to locate credentials; check" in complaint()


def damage(store, url: str, name: str, change) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listed = store.direct.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    (key,) = (item["Key"] for item in listed if item["Key"].endswith(name))
    content = bytearray(store.direct.get_object(Bucket=bucket, Key=key)["Body"].read())
    if change == "missing":
        store.direct.delete_object(Bucket=bucket, Key=key)
        return
    if change == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    store.direct.put_object(Bucket=bucket, Key=key, Body=bytes(content))


@pytest.mark.parametrize("how", ["memory", "stream, 2 workers"])
@pytest.mark.parametrize("change", ["missing", "truncated", "changed"])
def test_a_damaged_chunk_on_the_server_is_one_line(store, own_url, train, change, how, monkeypatch, capsys):
    damage(store, own_url, "chunk-0-2.bin", change)
    assert train(HOW[how], path=own_url) == 2
    line = only_line(capsys)
    if change == "missing":
        assert "chunk-0-2.bin: The specified key does not exist (NoSuchKey); check bucket and path" in line
    else:
        assert f"flashlab: error: {own_url}/bars-" in line
        reason = "chunk-0-2.bin has [0-9,]+ bytes, not" if change == "truncated" else "its checksum differs"
        assert re.search(rf" is damaged or out of reach at bar (1,[4-9]00|2,000) \({reason}", line)
    assert not store.line.failed


def test_a_damaged_index_or_manifest_on_the_server_is_one_line(store, own_url):
    damage(store, own_url, "index.json", "truncated")
    with pytest.raises(UserError, match="is damaged or out of reach at bar 0 "):
        open_set(own_url).bars()
    damage(store, own_url, "manifest.json", "changed")
    with pytest.raises(UserError, match=r"manifest\.json (is|was changed or) damaged"):
        open_set(own_url)


def test_a_full_disk_under_the_copy_is_one_line(store, url, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"^cannot write /.*flashlab-.*: No space left on device; free space there"):
        open_set(url).bars()


def test_a_file_is_never_taken_in_part(store, url):
    """Whatever breaks off in between, what arrives is the file."""
    name = open_set(url).manifest["chunks"] + "/chunk-0-0.bin"
    expected = open_storage(url)(name)
    store.line.reset("truncate", "truncate", "drop", "slow down", None)
    assert open_storage(url)(name) == expected
    assert len(store.line.failed) == 4
