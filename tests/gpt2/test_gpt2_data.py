import json
import os
import shutil
import tempfile
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from flashlab import object_storage
from flashlab.errors import UserError
from flashlab.gpt2 import data
from flashlab.gpt2.data import Blocks, OrderedBatches, ShuffledShards
from flashlab.gpt2.prepare import prepare
from flashlab.gpt2.tokenizer import ByteTokenizer, load_tokenizer
from flashlab.gpt2.tokens import SCHEMA_VERSION, checksum, open_set
from flashlab.training.batches import EndlessBatches, loader
from object_store import KEYS, object_store

BLOCK = 100
PER_SHARD = [5, 0, 17, 3, 40, 1, 8, 22, 13]


@pytest.fixture(autouse=True)
def groups_of_three(monkeypatch):
    """A small set has several groups of shards, too."""
    monkeypatch.setattr(data, "SHARDS_TOGETHER", 3)


@pytest.fixture
def copy(token_set, tmp_path):
    """A copy of the set, to damage."""
    return Path(shutil.copytree(token_set, tmp_path / "set"))


def stored_blocks(tokens, part):
    """Cut the shards into blocks without litdata."""
    blocks = []
    for shard in tokens.shards(part):
        path = Path(tokens.folder(part)) / shard["name"]
        stored = np.fromfile(path, tokens.manifest["dtype"], offset=path.stat().st_size - 2 * shard["tokens"])
        blocks += np.split(stored[: len(stored) // (BLOCK + 1) * (BLOCK + 1)], len(stored) // (BLOCK + 1))
    return torch.from_numpy(np.stack(blocks).astype(np.int64))


# --- blocks


@pytest.mark.parametrize("part", ["train", "validation"])
def test_blocks_are_the_shards_cut_into_pieces(token_set, part):
    tokens = open_set(token_set, ByteTokenizer())
    blocks = Blocks(tokens, part, BLOCK)
    expected = stored_blocks(tokens, part)
    assert len(blocks) == len(expected) > 100
    read = torch.stack([blocks[index] for index in range(len(blocks))])
    assert read.dtype == torch.int64
    assert torch.equal(read, expected)
    some = [7, 3, len(blocks) - 1, 7, 0]
    assert torch.equal(blocks.__getitems__(some), expected[some])


def test_litdata_reads_the_set_by_itself(token_set):
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    tokens = open_set(token_set)
    expected = stored_blocks(tokens, "train")
    stored = StreamingDataset(tokens.folder("train"), item_loader=TokensLoader(block_size=BLOCK + 1), shuffle=False)
    read = torch.cat([torch.as_tensor(np.asarray(batch)) for batch in StreamingDataLoader(stored, batch_size=16)])
    assert torch.equal(read.long(), expected)


# --- the order


def order(per_shard=PER_SHARD, seed=3, **how):
    return list(EndlessBatches(ShuffledShards(per_shard, seed), **{"batch_size": 4, "num_steps": 70} | how))


def flat(batches):
    return list(chain.from_iterable(batches))


def test_every_epoch_has_every_block_once_in_an_order_of_its_own():
    count = sum(PER_SHARD)
    blocks = flat(order(batch_size=1, num_steps=3 * count))
    epochs = [blocks[start : start + count] for start in range(0, len(blocks), count)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_ranks_share_the_batch_of_one():
    together = order(batch_size=12)
    for world_size, batch_size in ((2, 6), (3, 4), (4, 3), (12, 1)):
        ranks = [order(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [flat(batches) for batches in zip(*ranks, strict=True)] == together


def test_accumulated_micro_batches_are_the_batch():
    micro = order(batch_size=4, num_steps=60)
    assert [flat(micro[step : step + 3]) for step in range(0, 60, 3)] == order(batch_size=12, num_steps=20)


@pytest.mark.parametrize("start_step", [1, 26, 27, 28, 69, 70])
def test_a_run_that_is_resumed_reads_on_where_it_was(start_step):
    assert order(start_step=start_step) == order()[start_step:]
    assert len(EndlessBatches(ShuffledShards(PER_SHARD, 3), 4, 70, start_step=start_step)) == 70


def test_a_run_is_resumed_on_another_number_of_ranks():
    ranks = [order(rank=rank, world_size=3, start_step=20, start_item=80) for rank in range(3)]
    rest = flat(flat(batches) for batches in zip(*ranks, strict=True))
    assert rest == flat(order(num_steps=20 + 150))[80:]


def test_seeds_shuffle_otherwise_and_the_order_is_that_of_earlier_versions():
    assert order(seed=4) != order()
    assert order(num_steps=3) == [[19, 5, 16, 93], [8, 91, 14, 0], [80, 89, 86, 81]], (
        "a run that is resumed with this version would read other blocks"
    )


def test_blocks_of_few_shards_are_read_at_a_time():
    shard_of = np.repeat(np.arange(len(PER_SHARD)), PER_SHARD)
    for batch_size in (1, 4):
        blocks = flat(order(batch_size=batch_size, num_steps=sum(PER_SHARD) // batch_size))
        shards = [shard_of[block] for block in blocks]
        spans = [(shards.index(shard), len(shards) - shards[::-1].index(shard)) for shard in set(shards)]
        assert all(sum(first <= at < last for first, last in spans) <= 3 for at in range(len(blocks)))


def test_blocks_of_one_group_are_well_mixed():
    """Of two shards read together, about half of the neighbours come from the other one."""
    blocks = flat(order(per_shard=[2000, 2000], batch_size=1, num_steps=4000))
    other = sum((one < 2000) != (two < 2000) for one, two in pairwise(blocks))
    assert 1800 < other < 2200


def test_validation_reads_all_blocks_once_in_order():
    assert list(OrderedBatches(10, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(OrderedBatches(10, 4)) == 3
    ranks = [list(OrderedBatches(11, 2, rank=rank, world_size=3)) for rank in range(3)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[2, 1]] * 3
    assert sorted(block for batches in ranks for batch in batches for block in batch) == list(range(9))
    assert list(OrderedBatches(8, 2, rank=1, world_size=2)) == [[1, 3], [5, 7]]


# --- from wherever it comes


def batches_of(path, num_workers=0, start_step=0):
    blocks = Blocks(open_set(path), "train", BLOCK)
    batches = EndlessBatches(ShuffledShards(blocks.per_shard, 5), 16, 90, start_step=start_step)
    return list(loader(blocks, batches, num_workers=num_workers))


@pytest.fixture(scope="module")
def storage():
    """A server that speaks S3, and the settings by which clients find it."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv({"region_name": "AWS_DEFAULT_REGION"}.get(name, name.upper()), value)
        patch.setenv("AWS_ENDPOINT_URL", store.line.url)
        yield store


@pytest.fixture(scope="module")
def bucket(token_set, storage):
    return storage.put(token_set, "lab", "set")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_set_gives_the_same_batches_from_wherever_it_is_read(
    token_set, bucket, monkeypatch, tmp_path, where, num_workers
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read = batches_of(bucket if where == "s3" else token_set, num_workers)
    expected = stored_blocks(open_set(token_set), "train")
    per_shard = Blocks(open_set(token_set), "train", BLOCK).per_shard
    order = list(EndlessBatches(ShuffledShards(per_shard, 5), 16, 90))
    assert len(expected) / 4 < 90 * 16
    assert all(torch.equal(batch, expected[indices]) for batch, indices in zip(read, order, strict=True))
    resumed = batches_of(bucket if where == "s3" else token_set, num_workers, start_step=80)
    assert all(map(torch.equal, resumed, read[80:]))
    if num_workers:  # they have ended, and what they kept is gone
        assert not list(tmp_path.glob("flashlab-*"))


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_workers_open_the_set_anew_when_it_is_open_already(token_set, bucket, where):
    blocks = Blocks(open_set(bucket if where == "s3" else token_set), "train", BLOCK)
    expected = torch.stack([blocks[index] for index in range(8)])
    [batch] = loader(blocks, OrderedBatches(min(len(blocks), 8), 8), num_workers=1)
    assert torch.equal(batch, expected)


def test_what_is_streamed_is_kept_in_part_and_fetched_once_while_kept(token_set, bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(data, "KEPT", 6)
    fetched = Counter()
    fetch = data._Cache._fetch
    monkeypatch.setattr(data._Cache, "_fetch", lambda self, number: fetched.update([number]) or fetch(self, number))
    blocks = Blocks(open_set(bucket), "train", BLOCK)
    expected = stored_blocks(open_set(token_set), "train")
    for batch in EndlessBatches(ShuffledShards(blocks.per_shard, 5), 16, len(blocks) // 16):
        assert torch.equal(blocks.__getitems__(batch), expected[batch])
        [cache] = tmp_path.glob("flashlab-*")
        assert len(list(cache.glob("shard-*"))) <= 6
    assert len(fetched) > 12
    assert max(fetched.values()) == 1


def test_the_vocabulary_comes_with_the_set(corpus, vocabulary, tmp_path, storage):
    pytest.importorskip("tiktoken")
    how = {"validation": 0.2, "processes": 1}
    prepare([str(corpus)], out=tmp_path / "a/set", tokenizer="gpt2", vocabulary=vocabulary, **how)
    expected = load_tokenizer("gpt2", vocabulary)
    for path in (tmp_path / "a/set", storage.put(tmp_path / "a/set", "lab", "byte_pairs")):
        assert open_set(path, expected).tokenizer.tokens == expected.tokens
    [kept] = (tmp_path / "a/set").glob("tokens-*/vocabulary.tiktoken")
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"set was made with the tokenizer gpt2 \(407 .*not with gpt2 \(406"):
        _ = open_set(tmp_path / "a/set").tokenizer
    kept.unlink()
    with pytest.raises(UserError, match=r"cannot read .*vocabulary.tiktoken: No such file or directory; prepare"):
        _ = open_set(tmp_path / "a/set").tokenizer


# --- what is refused


def test_another_tokenizer_is_refused_in_one_line(token_set, vocabulary):
    pytest.importorskip("tiktoken")
    complaint = (
        r"set was made with the tokenizer bytes \(257 tokens, fingerprint \w{8}\), not with gpt2 \(407, \w{8}\); "
    )
    with pytest.raises(UserError, match=complaint) as caught:
        open_set(token_set, load_tokenizer("gpt2", vocabulary))
    assert "\n" not in str(caught.value)


def shard_of(path, part="train", number=4):
    tokens = open_set(path)
    return Path(tokens.folder(part)) / tokens.shards(part)[number]["name"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "verify", "complaint"),
    [
        (
            lambda path: os.truncate(path, path.stat().st_size - 1),
            False,
            r"is cut short or damaged: it has [\d,]+ bytes of",
        ),
        (lambda path: path.write_bytes(b""), False, "is cut short or damaged: it has 0 bytes of"),
        (lambda path: path.unlink(), False, "is missing"),
        (flip, True, "is damaged: its checksum differs"),
    ],
)
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_damaged_shard_is_named_on_opening(copy, part, damage, verify, complaint):
    path = shard_of(copy, part, number=0)
    damage(path)
    with pytest.raises(
        UserError, match=rf"{part}/{path.name} {complaint}.*; prepare the set again: what is whole is kept"
    ):
        open_set(copy, verify=verify)


def test_a_number_that_is_no_token_is_named_before_it_reaches_a_model(copy):
    path = shard_of(copy)
    content = bytearray(path.read_bytes())
    content[-1] = 0xFF
    path.write_bytes(content[: len(content) // 2] + b"\xff\xff" + content[len(content) // 2 + 2 :])
    with pytest.raises(UserError, match=rf"{path.name} is damaged: it holds the token 65,535 of a vocabulary of 257"):
        for _ in loader(blocks := Blocks(open_set(copy), "train", BLOCK), OrderedBatches(len(blocks), 8)):
            pass


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_damaged_in_object_storage_is_named(copy, storage, num_workers):
    url = storage.put(copy, "lab", f"damaged{num_workers}")
    blocks = Blocks(open_set(url), "train", BLOCK)
    batches = OrderedBatches(len(blocks), 8)
    path = shard_of(copy, number=0)
    flip(path)
    storage.put(copy, "lab", f"damaged{num_workers}")
    with pytest.raises(UserError, match=rf"^s3://.*{path.name} is damaged: its checksum differs; upload the set"):
        next(iter(loader(blocks, batches, num_workers=num_workers)))
    storage.direct.delete_object(Bucket="lab", Key=f"damaged{num_workers}/{path.relative_to(copy)}")
    with pytest.raises(UserError, match=rf"^cannot fetch s3://.*{path.name}: .*NoSuchKey.*check bucket and path"):
        next(iter(loader(blocks, batches, num_workers=num_workers)))
    with pytest.raises(UserError, match=r"^cannot fetch s3://.*nothing/manifest.json"):
        open_set(url + "/nothing")


def test_a_line_that_fails_now_and_then_changes_nothing(token_set, bucket, storage, monkeypatch):
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.01)
    storage.line.reset(None, "slow down", None, "drop", "truncate", None)
    try:
        read = batches_of(bucket)
    finally:
        failed = len(storage.line.failed)
        storage.line.reset()
    assert failed > 10
    assert all(map(torch.equal, read, batches_of(token_set)))


def edit(**changes):
    def change(path):
        manifest = json.loads(path.read_text()) | changes
        manifest.pop("crc32")
        path.write_text(json.dumps(manifest | {"crc32": checksum(manifest)}))

    return change


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda path: path.unlink(),
            r"set is not a token set \(it has no manifest.json\); make it with `flashlab gpt2",
        ),
        (lambda path: path.write_text("{"), "manifest.json is damaged, or another program's"),
        (lambda path: path.write_text("[]"), "manifest.json is damaged, or another program's"),
        (lambda path: path.write_text('{"schema_version": 1}'), "manifest.json is damaged, or another program's"),
        (lambda path: path.write_text(path.read_text().replace("uint16", "uint32")), "was changed or damaged"),
        (edit(schema_version=99), f"has schema version 99, this flashlab reads {SCHEMA_VERSION}; make it with"),
    ],
)
def test_a_manifest_that_is_not_what_prepare_wrote_is_refused(copy, damage, complaint):
    damage(copy / "manifest.json")
    with pytest.raises(UserError, match=complaint):
        open_set(copy)


def test_too_little_text_for_a_block_is_refused(token_set):
    tokens = open_set(token_set)
    longest = max(shard["tokens"] for shard in tokens.shards("train"))
    assert len(Blocks(tokens, "train", longest - 1)) == 1
    complaint = (
        rf"the train part has no block of {longest:,} \+ 1 tokens \(its longest shard has {longest:,}\); take a s"
    )
    with pytest.raises(UserError, match=complaint):
        Blocks(tokens, "train", longest)


def test_islice_of_an_endless_run_is_cheap():
    """A set of 50,000 shards: the order of the first steps needs no list of its hundred million blocks."""
    batches = EndlessBatches(ShuffledShards([4000] * 50_000, 0), 8, 10**9, start_step=10**8)
    assert len(list(islice(batches, 3))) == 3
