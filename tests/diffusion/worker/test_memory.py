"""The memory meter's figures, given what a device would have measured."""

import math
from typing import Any

import torch

from tests.diffusion.helpers import fake_config
from vllm_omni.diffusion.worker.memory import MemoryMeter

GIB = 2**30


def meter(budget: float, **kwargs: Any) -> MemoryMeter:
    made = MemoryMeter(fake_config(**kwargs), torch.device("cpu"))
    made._budget = budget
    return made


def test_nothing_measured_limits_nothing() -> None:
    made = meter(10 * GIB)
    assert made.token_limit("denoise") == math.inf
    assert made.fit_limit() == math.inf


def test_what_is_configured_limits_from_the_start() -> None:
    made = meter(10 * GIB, max_num_batched_tokens=4096)
    assert made.token_limit("denoise") == 4096
    assert made.fit_limit() == 4096


def test_the_largest_unit_seen_gives_the_bytes_per_token() -> None:
    made = meter(10 * GIB)
    made.record("denoise", 256, GIB)  # constant parts: 4 MiB a token
    made.record("denoise", 4096, 2 * GIB)
    made.record("denoise", 1024, 1 * GIB)
    assert made.token_limit("denoise") == 5 * 4096
    assert made.token_limit("decode") == math.inf


def test_requests_are_refused_only_by_peaks_that_say_something() -> None:
    made = meter(10 * GIB)
    made.record("decode", 256, GIB)
    assert made.token_limit("decode") == 2560
    assert made.fit_limit() == math.inf
    made.record("decode", 4096, 5 * GIB)
    assert made.fit_limit() == 8192


def test_measuring_on_a_cpu_changes_nothing() -> None:
    made = meter(math.inf)
    assert made.loaded() == {}
    with made.measure("denoise", 64):
        pass
    assert made.token_limit("denoise") == math.inf
