"""``/metrics``: what the server measures, for Prometheus. ``docs/user_guide/metrics.md`` lists the names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_omni.engine.stage_seam import StageLoad
from vllm_omni.outputs import OmniRequestOutput

router = APIRouter()
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0)
DIRECTIONS = ("in", "out")
PHASES = {"wait_s": "wait", "transfer_s": "transfer", "queue_s": "queue", "run_s": "run"}


class _Now(Collector):
    """Values that are read when they are asked for."""

    def __init__(self, open_requests: Callable[[], int], stages: Callable[[], Mapping[int, StageLoad]]) -> None:
        self._open_requests = open_requests
        self._stages = stages

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield GaugeMetricFamily(
            "vllm_omni_requests_open", "Requests that are admitted and not answered yet.", value=self._open_requests()
        )
        running = GaugeMetricFamily("vllm_omni_stage_requests", "Requests in the stage.", labels=["stage"])
        waiting = GaugeMetricFamily(
            "vllm_omni_stage_waiting", "Requests that wait for a place in the stage.", labels=["stage"]
        )
        queued = GaugeMetricFamily("vllm_omni_stage_queued", "Requests in the stage's own queue.", labels=["stage"])
        at_work = GaugeMetricFamily("vllm_omni_stage_running", "Requests that the stage works on.", labels=["stage"])
        for stage_id, load in self._stages().items():
            running.add_metric([str(stage_id)], load.inside)
            waiting.add_metric([str(stage_id)], load.waiting)
            queued.add_metric([str(stage_id)], load.queued)
            at_work.add_metric([str(stage_id)], load.running)
        yield from (running, waiting, queued, at_work)


class Metrics:
    """All measurements of one server."""

    def __init__(self, open_requests: Callable[[], int], stages: Callable[[], Mapping[int, StageLoad]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(open_requests, stages))
        self.http = Counter(
            "vllm_omni_http_requests", "Answers by endpoint and status.", ("endpoint", "status"), registry=self.registry
        )
        self.requests = Counter(
            "vllm_omni_requests", "Ended requests to the model, by outcome.", ("outcome",), registry=self.registry
        )
        self.refused = Counter("vllm_omni_requests_refused", "Requests beyond the queue.", registry=self.registry)
        self.tokens = Counter("vllm_omni_tokens", "Tokens of texts.", ("kind",), registry=self.registry)
        self.images = Counter("vllm_omni_images", "Pictures made.", registry=self.registry)
        self.audio = Counter("vllm_omni_audio_seconds", "Seconds of sound made.", registry=self.registry)
        self.seconds = self._histogram("vllm_omni_request_seconds", "Time of a request, to its last output.")
        self.image = self._histogram("vllm_omni_image_request_seconds", "Time of a request for pictures.")
        self.step = self._histogram("vllm_omni_step_seconds", "Time between two denoise steps of a request.", "stage")
        self.first_text = self._histogram("vllm_omni_time_to_first_text_seconds", "Time to the first text (TTFT).")
        self.first_audio = self._histogram("vllm_omni_time_to_first_audio_seconds", "Time to the first sound (TTFP).")
        self.phase = self._histogram(
            "vllm_omni_stage_seconds", "Time of a request in a stage, by phase.", "stage", "phase"
        )
        self.transfer = self._histogram(
            "vllm_omni_transfer_seconds", "Time of a request on its way to a stage, and back.", "stage", "direction"
        )
        self.transferred = Counter(
            "vllm_omni_transfer_bytes", "Bytes to a stage, and back.", ("stage", "direction"), registry=self.registry
        )
        self.real_time = Histogram(
            "vllm_omni_real_time_factor",
            "Time of a request over the length of the sound it made (RTF).",
            buckets=FACTORS,
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=SECONDS, registry=self.registry)


class RequestWatch:
    """Measures one request; told of its outputs and steps as they come."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begun = time.monotonic()
        self._steps: dict[int, float] = {}
        self._audio = 0.0
        self._images = 0
        self._times: Mapping[str, Mapping[str, float]] = {}
        self._seen: set[str] = set()

    def _since(self) -> float:
        return time.monotonic() - self._begun

    def step(self, stage_id: int) -> None:
        """A stage got one step further."""
        now = time.monotonic()
        if stage_id in self._steps:
            self._metrics.step.labels(str(stage_id)).observe(now - self._steps[stage_id])
        self._steps[stage_id] = now

    def output(self, output: OmniRequestOutput) -> None:
        """An output has come."""
        self._times = output.metrics.get("stages", self._times)
        if output.is_pipeline_output and output.outputs:
            self._text(output, len(output.outputs[0].token_ids))
        elif "audio" in output.multimodal_output:
            self._first("audio", self._metrics.first_audio)
            media = output.multimodal_output
            self._audio += media["audio"].shape[-1] / int(media["sr"])
        self._images += len(output.images)

    def _text(self, output: OmniRequestOutput, tokens: int) -> None:
        if "text" not in self._seen:
            self._metrics.tokens.labels("prompt").inc(len(output.prompt_token_ids or ()))
        self._first("text", self._metrics.first_text)
        self._metrics.tokens.labels("generated").inc(tokens)

    def _first(self, kind: str, histogram: Histogram) -> None:
        if kind not in self._seen:
            self._seen.add(kind)
            histogram.observe(self._since())

    def end(self, outcome: str) -> None:
        """The request has ended: ``ok``, ``aborted``, or the name of its error."""
        self._metrics.requests.labels(outcome).inc()
        if outcome != "ok":
            return
        seconds = self._since()
        self._metrics.seconds.observe(seconds)
        if self._images:
            self._metrics.images.inc(self._images)
            self._metrics.image.observe(seconds)
        if self._audio:
            self._metrics.audio.inc(self._audio)
            self._metrics.real_time.observe(seconds / self._audio)
        for stage_id, times in self._times.items():
            for name, phase in PHASES.items():
                if name in times:
                    self._metrics.phase.labels(stage_id, phase).observe(times[name])
            for way in DIRECTIONS:
                if f"transfer_{way}_s" in times:
                    self._metrics.transfer.labels(stage_id, way).observe(times[f"transfer_{way}_s"])
                    self._metrics.transferred.labels(stage_id, way).inc(times[f"bytes_{way}"])


@router.get("/metrics")
def expose(request: Request) -> Response:
    """All measurements in Prometheus's text form."""
    metrics: Metrics = request.app.state.service.metrics
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
