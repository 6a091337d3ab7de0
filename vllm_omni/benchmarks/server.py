"""What the server says of itself: what it serves, and how long its stages took."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.benchmarks.http_client import Answer, BrokenAnswer, HttpClient
from vllm_omni.benchmarks.workload import Target
from vllm_omni.errors import ConfigError, DeadlineError

_STAGE = "vllm_omni_stage_seconds"
_POLL_S = 0.2
Sums = Mapping[tuple[str, str], tuple[float, float]]
"""(stage, phase) -> (seconds, requests)."""


async def find_target(client: HttpClient, args: BenchArgs) -> Target:
    """Ask the server what it serves, after ``args.wait`` seconds at most.

    Raises:
        ConfigError: no server there, one that wants a key, or one without the model.
        DeadlineError: it was not there in time.
    """
    answer = await _when_there(client, args)
    if answer.status in (401, 403):
        raise ConfigError(f"{args.base_url} wants a key: --api-key or VLLM_API_KEY", field="api_key")
    rows = _rows(answer)
    if not rows:
        raise ConfigError(
            f"{args.base_url}/v1/models answered {answer.status}: no OpenAI-compatible server", field="base_url"
        )
    names = [str(row["id"]) for row in rows]
    if args.model is not None and args.model not in names:
        raise ConfigError(f"model={args.model!r} is not served; there is {', '.join(names)}", field="model")
    row = rows[0] if args.model is None else rows[names.index(args.model)]
    makes = row.get("output_modalities")
    info = _object(await client.get("/v1/omni/info"))
    stages = info.get("stages", [])
    most = info.get("image", {}).get("size", {}).get("max_pixels")
    made = None if makes is None else frozenset(makes)
    return Target(str(row["id"]), made, len(stages), info.get("version"), most)


async def _when_there(client: HttpClient, args: BenchArgs) -> Answer:
    end = time.monotonic() + args.wait
    while True:
        try:
            return await client.get("/v1/models")
        except BrokenAnswer as error:
            raise ConfigError(f"{args.base_url}: {error}; no HTTP server", field="base_url") from error
        except ssl.SSLCertVerificationError as error:
            text = f"{args.base_url}: {error.verify_message}; SSL_CERT_FILE names the file of an authority of your own"
            raise ConfigError(text, field="base_url") from error
        except OSError as error:  # TimeoutError too
            if args.wait and time.monotonic() >= end:
                raise DeadlineError(f"no server at {args.base_url} within {args.wait:g} s", phase="wait") from error
            if not args.wait:
                text = f"no server at {args.base_url} ({error}); start one with: vllm-omni serve"
                raise ConfigError(text, field="base_url") from error
        await asyncio.sleep(_POLL_S)


def _object(answer: Answer) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(answer.body) if answer.status == 200 else {}
    except msgspec.DecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def _rows(answer: Answer) -> list[dict[str, Any]]:
    rows = _object(answer).get("data")
    return [row for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else []


async def stage_sums(client: HttpClient) -> Sums:
    """What ``/metrics`` has counted so far; empty when the server has none of it."""
    answer = await client.get("/metrics")
    if answer.status != 200:
        return {}
    found: dict[tuple[str, str], list[float]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        if family.name != _STAGE:
            continue
        for sample in family.samples:
            place = {f"{_STAGE}_sum": 0, f"{_STAGE}_count": 1}.get(sample.name)
            if place is not None:
                key = (sample.labels["stage"], sample.labels["phase"])
                found.setdefault(key, [0.0, 0.0])[place] = sample.value
    return {key: (seconds, count) for key, (seconds, count) in found.items()}


def stage_means(before: Sums, after: Sums) -> dict[str, dict[str, float]]:
    """Mean seconds of a request between two looks, by stage and phase."""
    out: dict[str, dict[str, float]] = {}
    for (stage, phase), (seconds, count) in sorted(after.items()):
        earlier_seconds, earlier_count = before.get((stage, phase), (0.0, 0.0))
        if count > earlier_count:
            out.setdefault(stage, {})[phase] = (seconds - earlier_seconds) / (count - earlier_count)
    return out
