import pytest

from flashlab.training import batches
from flashlab.training.batches import EndlessBatches, Shuffled


def steps(num_items=50, seed=3, **options) -> list[list[int]]:
    return list(EndlessBatches(Shuffled(num_items, seed), **({"batch_size": 8, "num_steps": 40} | options)))


def test_every_epoch_is_another_permutation():
    flat = [item for batch in steps(num_steps=25) for item in batch]
    epochs = [flat[first : first + 50] for first in range(0, 200, 50)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_the_seed():
    assert steps() == steps()
    assert steps() != steps(seed=4)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 2), (2, 4), (1, 8), (30, 3)])
def test_ranks_share_the_batch_that_one_rank_would_have(batch_size, world_size):
    ranks = [steps(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [[item for batch in batches for item in batch] for batches in zip(*ranks, strict=True)]
    assert together == steps(batch_size=batch_size * world_size)


@pytest.mark.parametrize("start_step", [0, 1, 6, 7, 39, 40])
def test_resumed_order_goes_on_where_it_was(start_step):
    rank = {"rank": 1, "world_size": 3}
    assert steps(start_step=start_step, **rank) == steps(**rank)[start_step:]
    assert len(EndlessBatches(Shuffled(50, 3), 8, 40, start_step=start_step)) == 40


def test_a_batch_may_be_larger_than_an_epoch():
    batch = steps(num_items=3, batch_size=8, num_steps=1)[0]
    assert [sorted(batch[:3]), sorted(batch[3:6])] == [[0, 1, 2], [0, 1, 2]]


def test_order_is_that_of_earlier_versions():
    assert steps(num_items=10, batch_size=4, num_steps=3) == [[9, 6, 0, 2], [1, 4, 7, 5], [3, 8, 4, 1]], (
        "a run that is resumed would read other items"
    )


def test_a_worker_is_silent_about_a_killed_reader_alone(capfd):
    for error in (EOFError(), ConnectionResetError(), ValueError("a bug")):
        batches._hide_lost_readers(type(error), error, None)
    assert capfd.readouterr().err == "ValueError: a bug\n"
