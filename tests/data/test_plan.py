"""The epoch plan: every sample once, equal steps, an order for each epoch, a shuffle within its window."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.data.plan import Plan, PreviousLayout, window_shuffle
from clipdistill.errors import InputError


def numbers(plan, epoch, rank, worker):
    """The samples that a worker gives out in an epoch, in order."""
    share = plan.partition(epoch, rank, worker)
    return share.number_N[share.order_N].tolist()


def epoch_numbers(plan, epoch):
    return [
        number
        for rank in range(plan.ranks)
        for worker in range(plan.workers)
        for number in numbers(plan, epoch, rank, worker)
    ]


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=9),
    batch_size=st.integers(1, 12),
    ranks=st.integers(1, 5),
    workers=st.integers(1, 7),
    shuffle=st.sampled_from([0, 1, 7, 1000]),
    epoch=st.integers(0, 50),
)
def test_every_sample_once_save_the_remainder(sizes, batch_size, ranks, workers, shuffle, epoch):
    total = sum(sizes)
    if total < ranks * batch_size:
        with pytest.raises(InputError, match=f"{total} samples.* needs {ranks * batch_size} "):
            Plan(sizes=sizes, batch_size=batch_size, ranks=ranks, workers=workers, seed=3, shuffle=shuffle)
        return
    plan = Plan(sizes=sizes, batch_size=batch_size, ranks=ranks, workers=workers, seed=3, shuffle=shuffle)
    seen = epoch_numbers(plan, epoch)
    assert len(seen) == plan.steps * ranks * batch_size > total - ranks * batch_size
    assert max(Counter(seen).values()) == 1
    assert set(seen) <= set(range(total))
    for rank in range(ranks):
        steps = [plan.partition(epoch, rank, worker).batches for worker in range(workers)]
        assert sum(steps) == plan.steps
        assert [len(numbers(plan, epoch, rank, worker)) for worker in range(workers)] == [
            batch_size * count for count in steps
        ]


def given_out(plan, step):
    """What each rank's and worker's batches before `step` of the plan hold, of the epoch of batch `step`."""
    epoch = plan.epoch_at(step)
    positions = [[0] * plan.workers for _ in range(plan.ranks)]
    seen = []
    for rank in range(plan.ranks):
        for batch in range(int(plan.before(epoch)), step):
            worker = batch % plan.workers
            start = positions[rank][worker]
            positions[rank][worker] += plan.batch_size
            seen += numbers(plan, epoch, rank, worker)[start : start + plan.batch_size]
    return epoch, positions, seen


layouts = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 6),
        "ranks": st.integers(1, 4),
        "workers": st.integers(1, 5),
        "shuffle": st.sampled_from([0, 1, 7, 1000]),
    }
)


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(lambda sizes: sum(sizes) >= 24),
    chain=st.lists(st.tuples(layouts, st.floats(0, 1)), min_size=2, max_size=4),
    epoch=st.integers(0, 3),
)
def test_layouts_that_take_over_from_each_other_see_every_sample_once(sizes, chain, epoch):
    """Interrupted anywhere in an epoch, several times, each time with other ranks, workers and batch sizes."""
    total, past, seen = sum(sizes), [], []
    plan = None
    for number, (layout, fraction) in enumerate(chain):
        first_epoch = epoch if number else 0
        plan = Plan(sizes=sizes, seed=3, first_epoch=first_epoch, past=past, **layout)
        if number == len(chain) - 1:
            break
        begin = int(plan.before(epoch))
        step = begin + int(fraction * plan.steps_of(epoch) * 0.999)
        reached, positions, part = given_out(plan, step)
        if reached != epoch:  # too little was left for one step
            assert plan.steps_of(epoch) == 0
            positions, part = [[0] * plan.workers for _ in range(plan.ranks)], []
        seen += part
        past = [*past, PreviousLayout(**layout, before=begin, positions=positions)]
    rest = epoch_numbers(plan, epoch)
    assert max(Counter(seen + rest).values(), default=1) == 1
    assert total - len(seen + rest) < plan.global_batch
    assert plan.steps_of(epoch) == plan.before(epoch + 1)
    following = epoch_numbers(plan, epoch + 1)
    assert len(set(following)) == len(following) == plan.steps * plan.global_batch


@given(steps=st.integers(1, 20), workers=st.integers(1, 9), epochs=st.integers(1, 6))
def test_workers_make_the_batches_in_turn_across_epochs(steps, workers, epochs):
    plan = Plan(sizes=[steps], batch_size=1, ranks=1, workers=workers, seed=0, shuffle=0)
    turns = Counter(batch % workers for batch in range(steps * epochs))
    made = {worker: sum(plan.batches(epoch, worker) for epoch in range(epochs)) for worker in range(workers)}
    assert made == {worker: turns[worker] for worker in range(workers)}


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 24),
    weight=st.integers(0, 2**32),
    layout=layouts,
    epoch=st.integers(0, 50),
    steps=st.integers(0, 5),
)
def test_an_epoch_of_weighted_samples(sizes, weight, layout, epoch, steps):
    """As long as one without weights; each sample as often as its weight, up or down to a whole number, with its
    repeats numbered; and other ranks and workers see what is left of it."""
    total = sum(sizes)
    weights = np.random.default_rng(weight).exponential(size=total) + 0.01
    weights *= total / weights.sum()
    plan = Plan(sizes=sizes, seed=weight, weights=weights, **(layout | {"batch_size": 1}))

    def held(plan, epoch):
        shares = [plan.partition(epoch, rank, worker) for rank in range(plan.ranks) for worker in range(plan.workers)]
        pairs = [zip(share.number_N.tolist(), share.repeat_N.tolist(), strict=True) for share in shares]
        return [pair for of_share in pairs for pair in of_share]

    whole = held(Plan(sizes=sizes, seed=weight, weights=weights, batch_size=1, ranks=1, workers=1, shuffle=0), epoch)
    times = Counter(number for number, _ in whole)
    assert len(whole) == total
    assert set(whole) == {(number, repeat) for number, count in times.items() for repeat in range(count)}
    for number, expected in enumerate(weights):
        assert np.floor(expected - 1e-9) <= times[number] <= np.ceil(expected + 1e-9)

    shared = held(plan, epoch)
    assert len(shared) == plan.steps * plan.global_batch
    assert not Counter(shared) - Counter(whole)
    step = min(steps, plan.steps)
    now, positions, seen = given_out(plan, step)
    past = PreviousLayout(**(layout | {"batch_size": 1}), before=int(plan.before(now)), positions=positions)
    other = Plan(
        sizes=sizes, seed=weight, weights=weights, batch_size=2, ranks=1, workers=1, shuffle=5,
        first_epoch=now, past=[past],
    )  # fmt: skip
    of_epoch = Counter(number for number, _ in held(replace(plan, ranks=1, workers=1), now))
    rest = Counter(seen) + Counter(number for number, _ in held(other, now))
    assert not rest - of_epoch
    assert total - rest.total() < 2


def test_weights_are_kept_on_average():
    weights = np.array([0.25, 3.5, 0.75, 1.5, 1, 2, 0.5, 0.5, 1, 1])
    weights *= 10 / weights.sum()
    plan = Plan(sizes=[4, 6], batch_size=1, ranks=1, workers=1, seed=0, shuffle=0, weights=weights)
    times = Counter(number for epoch in range(2000) for number in plan.partition(epoch, 0, 0).number_N.tolist())
    np.testing.assert_allclose([times[number] / 2000 for number in range(10)], weights, atol=0.05)


def test_shard_sample_and_number_mean_the_same():
    sizes = [5, 0, 7, 1, 30]
    plan = Plan(sizes=sizes, batch_size=4, ranks=2, workers=2, seed=1, shuffle=10)
    begins = np.cumsum([0, *sizes[:-1]])
    share = plan.partition(2, 1, 0)
    assert (share.sample_N < np.array(sizes)[share.shard_N]).all()
    assert (share.number_N == begins[share.shard_N] + share.sample_N).all()


def test_a_share_reads_each_shard_in_one_go():
    plan = Plan(sizes=[10] * 8, batch_size=5, ranks=2, workers=2, seed=0, shuffle=4)
    for rank in range(2):
        for worker in range(2):
            share = plan.partition(0, rank, worker)
            changes = np.flatnonzero(np.diff(share.shard_N))
            visited = share.shard_N[[0, *(changes + 1)]].tolist()
            assert len(visited) == len(set(visited))
            assert (np.diff(share.sample_N)[np.diff(share.shard_N) == 0] == 1).all()


@pytest.mark.parametrize("sizes", [[40], [13] * 10])
def test_orders_differ_by_epoch_and_seed_and_repeat(sizes):
    def order(seed, epoch):
        plan = Plan(sizes=sizes, batch_size=3, ranks=2, workers=2, seed=seed, shuffle=8)
        return tuple(epoch_numbers(plan, epoch))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in range(4)]
    assert len(set(orders)) == 8
    assert order(1, 2) == orders[6]


def test_the_remainder_changes_so_that_every_sample_is_seen_in_the_end():
    plan = Plan(sizes=[11], batch_size=4, ranks=2, workers=1, seed=0, shuffle=4)
    seen = {number for epoch in range(20) for number in epoch_numbers(plan, epoch)}
    assert seen == set(range(11))


@given(length=st.integers(0, 300), window=st.integers(0, 320), seed=st.integers(0, 99))
def test_a_window_shuffle_is_a_permutation_within_its_window(length, window, seed):
    order = window_shuffle(length, window, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(length))
    assert (np.abs(order - np.arange(length)) < max(window, 1)).all()


def test_a_window_shuffle_holds_no_more_than_its_window():
    order = window_shuffle(5000, 100, np.random.default_rng(0))
    read = np.maximum.accumulate(order) + 1
    held = read - np.arange(5000)
    assert 40 < held.max() <= 100


def test_a_window_shuffle_mixes():
    order = window_shuffle(5000, 1000, np.random.default_rng(0))
    away = np.abs(order - np.arange(5000))[1000:-1000]
    assert away.mean() > 200


def test_the_order_of_a_run_made_today_is_that_of_tomorrow():
    plan = Plan(sizes=[4, 3, 5], batch_size=2, ranks=1, workers=2, seed=7, shuffle=3)
    assert [numbers(plan, 1, 0, worker) for worker in range(2)] == [
        [10, 0, 11, 1, 2, 3],
        [4, 5, 6, 8, 7, 9],
    ]


@pytest.mark.parametrize("field", ["batch_size", "ranks", "workers", "seed", "shuffle"])
def test_numbers_out_of_range_are_refused(field):
    numbers = {"batch_size": 1, "ranks": 1, "workers": 1, "seed": 0, "shuffle": 0} | {field: -1}
    with pytest.raises(ValueError, match=f"{field} is -1"):
        Plan(sizes=[10], **numbers)
