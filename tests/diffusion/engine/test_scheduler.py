"""The scheduler alone: what it picks, in which order, and that nobody starves."""

import random
import time
from collections import Counter

import pytest

from vllm_omni.diffusion.scheduler import HELD_BATCHES, SIDE_BATCH, STEP_AGING, Phase, Scheduler, Unit, UnitKind


def do(scheduler: Scheduler, unit: Unit, spec: dict[str, tuple[str, int, int]]) -> None:
    """Carry out ``unit``; ``spec`` maps a request to (bucket, steps, tokens)."""
    if unit.kind is UnitKind.ENCODE:
        for request_id in unit.request_ids:
            scheduler.encoded(request_id, *spec[request_id])
    elif unit.kind is UnitKind.DENOISE:
        scheduler.stepped(unit.request_ids)
    else:
        for request_id in unit.request_ids:
            scheduler.finish(request_id)


def drain(scheduler: Scheduler, spec: dict[str, tuple[str, int, int]]) -> list[Unit]:
    units = []
    while (unit := scheduler.next_unit()) is not None:
        units.append(unit)
        do(scheduler, unit, spec)
        assert len(units) < 100_000
    return units


def denoise_counts(units: list[Unit]) -> Counter:
    return Counter(request_id for unit in units if unit.kind is UnitKind.DENOISE for request_id in unit.request_ids)


def test_one_request_is_encoded_denoised_and_decoded() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a")
    units = drain(scheduler, {"a": ("x", 3, 16)})
    assert [unit.kind.value for unit in units] == ["encode", "denoise", "denoise", "denoise", "decode"]
    assert len(scheduler) == 0


def test_requests_of_one_bucket_share_steps_up_to_the_limit() -> None:
    scheduler = Scheduler(2)
    spec = dict.fromkeys("abc", ("x", 2, 16))
    for name in spec:
        scheduler.add(name)
    units = drain(scheduler, spec)
    assert max(len(unit.request_ids) for unit in units if unit.kind is UnitKind.DENOISE) == 2
    assert denoise_counts(units) == {"a": 2, "b": 2, "c": 2}


def test_a_request_joins_and_leaves_between_steps() -> None:
    scheduler = Scheduler(4)
    spec = {"long": ("x", 6, 16), "short": ("x", 2, 16)}
    scheduler.add("long")
    for _ in range(3):  # encode, two steps
        do(scheduler, scheduler.next_unit(), spec)
    scheduler.add("short")
    batches = [unit.request_ids for unit in drain(scheduler, spec) if unit.kind is UnitKind.DENOISE]
    assert batches == [("long", "short"), ("long", "short"), ("long",), ("long",)]


def test_between_two_encodes_or_decodes_the_batch_gets_a_step() -> None:
    scheduler = Scheduler(2)
    spec = {str(i): ("x", 3, 16) for i in range(12)}
    for name in spec:
        scheduler.add(name, shape="x")
    steps_left: dict[str, int] = {}
    last_was_side = False
    kinds = set()
    while (unit := scheduler.next_unit()) is not None:
        runnable = any(steps_left.values())
        if last_was_side and runnable:
            assert unit.kind is UnitKind.DENOISE
        for name in unit.request_ids:
            steps_left[name] = 3 if unit.kind is UnitKind.ENCODE else max(0, steps_left[name] - 1)
        last_was_side = unit.kind is not UnitKind.DENOISE
        kinds.add(unit.kind)
        do(scheduler, unit, spec)
    assert kinds == {UnitKind.ENCODE, UnitKind.DENOISE, UnitKind.DECODE}


def test_a_decode_waits_for_one_step_at_most_and_holds_the_batch_up_for_one_unit() -> None:
    scheduler = Scheduler(4)
    spec = {"short": ("x", 1, 16), "long": ("x", 9, 16)}
    scheduler.add("short")
    scheduler.add("long")
    kinds = [unit.kind.value for unit in drain(scheduler, spec)]
    assert kinds[:4] == ["encode", "denoise", "decode", "denoise"]


def test_token_limit_bounds_a_batch_but_never_a_single_request() -> None:
    scheduler = Scheduler(8, token_limit=40)
    spec = dict.fromkeys("abc", ("x", 1, 16)) | {"huge": ("y", 1, 1000)}
    for name in spec:
        scheduler.add(name)
    batches = [unit.request_ids for unit in drain(scheduler, spec) if unit.kind is UnitKind.DENOISE]
    assert ("a", "b") in batches
    assert ("c",) in batches
    assert ("huge",) in batches


def test_requests_that_must_run_alone_do() -> None:
    scheduler = Scheduler(8)
    spec = dict.fromkeys("abcd", ("x", 2, 16))
    for name in spec:
        scheduler.add(name)
    do(scheduler, scheduler.next_unit(), spec)
    scheduler.run_alone(["b", "c"])
    for unit in drain(scheduler, spec):
        assert not {"b", "c"} & set(unit.request_ids) or len(unit.request_ids) == 1


def test_pipelines_without_steps_run_one_by_one_in_order() -> None:
    scheduler = Scheduler(8, by_steps=False)
    for name in "abc":
        scheduler.add(name)
    assert drain(scheduler, {}) == [Unit(UnitKind.RUN, (name,)) for name in "abc"]


def test_finish_removes_a_request_in_every_phase() -> None:
    spec = {"a": ("x", 2, 16), "b": ("x", 2, 16)}
    for stop_after in range(5):
        scheduler = Scheduler(4)
        scheduler.add("a", shape="s")
        scheduler.add("b", shape="s")
        for _ in range(stop_after):
            do(scheduler, scheduler.next_unit(), spec)
        scheduler.finish("a")
        scheduler.finish("a")  # idempotent
        assert all("a" not in unit.request_ids for unit in drain(scheduler, spec))
        assert len(scheduler) == 0
        assert scheduler._held == {}
        assert scheduler._held_total == 0


def test_deadlines_are_reported_with_their_phase() -> None:
    scheduler = Scheduler(4)
    spec = {"a": ("x", 2, 16)}
    scheduler.add("a", deadline=10.0)
    scheduler.add("b")
    assert scheduler.expired(9.9) == []
    assert scheduler.expired(10.0) == [("a", Phase.WAITING)]
    scheduler.finish("b")
    do(scheduler, scheduler.next_unit(), spec)
    assert scheduler.expired(10.0) == [("a", Phase.DENOISING)]
    for _ in range(2):
        do(scheduler, scheduler.next_unit(), spec)
    assert scheduler.expired(10.0) == [("a", Phase.DECODING)]


def test_a_small_picture_is_not_stuck_behind_big_ones() -> None:
    """Twenty big requests are under way; the small one pays about twice its own time, not theirs."""
    scheduler = Scheduler(4)
    spec = {f"big{i}": ("big", 50, 4096) for i in range(20)} | {"small": ("small", 20, 1024)}
    for name in list(spec)[:-1]:
        scheduler.add(name, shape="big")
    for _ in range(10):
        do(scheduler, scheduler.next_unit(), spec)
    scheduler.add("small", shape="small")
    cost = 0
    while "small" in scheduler:
        unit = scheduler.next_unit()
        if unit.kind is UnitKind.DENOISE:
            cost += sum(spec[name][2] for name in unit.request_ids)
        do(scheduler, unit, spec)
    own = 20 * 1024
    biggest_step = 4 * 4096
    assert cost <= 2 * own + 3 * biggest_step


def test_a_big_picture_gets_its_share_while_small_ones_keep_coming() -> None:
    scheduler = Scheduler(1)
    spec = {"big": ("big", 10, 4096)}
    scheduler.add("big", shape="big")
    units = 0
    while "big" in scheduler:
        if units % 3 == 0:
            name = f"small{units}"
            spec[name] = ("small", 4, 256)
            scheduler.add(name, shape="small")
        do(scheduler, scheduler.next_unit(), spec)
        units += 1
        assert units < 10 * (4096 // 256) * 4


def test_a_size_that_was_idle_does_not_claim_the_time_it_did_not_use() -> None:
    """After a hundred steps of one size alone, a second one gets every other step, not the next hundred."""
    scheduler = Scheduler(4)
    spec = {"old": ("x", 200, 16), "new": ("y", 50, 16)}
    scheduler.add("old")
    for _ in range(101):
        do(scheduler, scheduler.next_unit(), spec)
    scheduler.add("new")
    units = []
    for _ in range(21):
        units.append(scheduler.next_unit())
        do(scheduler, units[-1], spec)
    counts = denoise_counts(units)
    assert abs(counts["old"] - counts["new"]) <= 2, counts


def test_new_shapes_without_end_do_not_starve_the_oldest_request() -> None:
    """Every unit a request of a shape never seen before arrives: aging alone bounds the old one's wait."""
    scheduler = Scheduler(4)
    steps = 5
    spec = {"old": ("old", steps, 1_000_000)}
    scheduler.add("old", shape="old")
    units = 0
    while "old" in scheduler:
        name = f"new{units}"
        spec[name] = (name, 3, 1)
        scheduler.add(name, shape=name)
        do(scheduler, scheduler.next_unit(), spec)
        units += 1
        assert units <= 2 * STEP_AGING * (steps + 2)


@pytest.mark.parametrize("seed", range(60))
def test_any_mix_finishes_within_a_bound(seed: int) -> None:
    """Random sizes, steps, arrivals, cancels and limits: all finish, each in no more units than its bound."""
    rng = random.Random(seed)
    max_batch = rng.choice([1, 2, 4, 8])
    scheduler = Scheduler(max_batch, token_limit=rng.choice([float("inf"), 5000]))
    shapes = [(f"s{i}", rng.choice([64, 256, 1024, 4096])) for i in range(rng.randint(1, 6))]
    arrivals: dict[int, list[str]] = {}
    spec = {}
    for index in range(rng.randint(1, 40)):
        shape, tokens = rng.choice(shapes)
        spec[f"r{index}"] = (shape, rng.randint(0, 12), tokens)
        arrivals.setdefault(rng.randint(0, 60), []).append(f"r{index}")
    work = sum(steps + 2 for _, steps, _ in spec.values())
    added: dict[str, int] = {}
    cancelled: set[str] = set()
    done: dict[str, int] = {}
    steps_seen: Counter = Counter()
    now = 0
    while arrivals or len(scheduler):
        for name in arrivals.pop(now, []):
            scheduler.add(name, shape=spec[name][0])
            added[name] = now
        if rng.random() < 0.02 and len(scheduler):
            victim = rng.choice(scheduler.request_ids())
            scheduler.finish(victim)
            cancelled.add(victim)
        unit = scheduler.next_unit()
        if unit is not None:
            assert len(set(unit.request_ids)) == len(unit.request_ids)
            assert not cancelled & set(unit.request_ids)
            assert len(unit.request_ids) <= (max_batch if unit.kind is UnitKind.DENOISE else SIDE_BATCH)
            if unit.kind is UnitKind.DENOISE:
                steps_seen.update(unit.request_ids)
                assert len({spec[name][0] for name in unit.request_ids}) == 1
            do(scheduler, unit, spec)
            if unit.kind is UnitKind.DECODE:
                done.update(dict.fromkeys(unit.request_ids, now))
        assert scheduler._held_total <= HELD_BATCHES * max_batch
        now += 1
        assert now <= work + 100, "a request starves or the scheduler idles with work to do"
    assert done.keys() | cancelled == spec.keys()
    for name, at in done.items():
        assert steps_seen[name] == spec[name][1]
        assert at - added[name] <= work


def test_overhead_per_step_with_a_hundred_requests() -> None:
    scheduler = Scheduler(8)
    spec = {f"r{i}": (f"b{i % 10}", 30, 1024 * (1 + i % 10)) for i in range(100)}
    for index, name in enumerate(spec):
        scheduler.add(name, shape=index % 10, deadline=1e12)
    units = 0
    started = time.process_time()
    while (unit := scheduler.next_unit()) is not None:
        scheduler.expired(0.0)
        do(scheduler, unit, spec)
        units += 1
    assert (time.process_time() - started) / units < 100e-6
