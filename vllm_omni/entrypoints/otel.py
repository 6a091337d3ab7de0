"""Traces for a collector that speaks OTLP, by vLLM's own exporter: a span for each request, in it one for each stage.

The request's span continues the trace that its caller began (``traceparent`` among the request's headers). Stages on
vLLM make their ``llm_request`` span within the stage's span.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm_omni.entrypoints.tracing import RequestTrace, Slice
from vllm_omni.errors import ConfigError

FLUSH_MS = 2000
"""Milliseconds that the end of the program may wait for the collector."""


class OtelRecorder:
    """Recorder that sends spans.

    Args:
        endpoint: where the collector listens; OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says how (grpc, or http/protobuf).
        detailed: whether each step of a stage is a span of its own.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, detailed: bool) -> None:
        try:
            import opentelemetry.exporter.otlp.proto.grpc
            import opentelemetry.exporter.otlp.proto.http
            import opentelemetry.sdk.trace  # noqa: F401 (what vLLM's exporter needs)
            from opentelemetry import propagate, trace
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint={endpoint!r}: {error}; OpenTelemetry comes with pip install 'vllm-omni[otel]'",
                field="otlp_traces_endpoint",
            ) from error
        from vllm import tracing

        self._api: Any = trace
        self._propagate: Any = propagate
        try:
            self._tracer: Any = tracing.init_tracer("vllm_omni", endpoint)
        except ValueError as error:
            raise ConfigError(f"otlp_traces_endpoint: {error}", field="otlp_traces_endpoint") from error
        self._detailed = detailed
        self._shift = time.time_ns() - time.monotonic_ns()
        self._names: dict[int, str] = {}
        self._open: dict[RequestTrace, dict[int | None, Any]] = {}

    def name_stages(self, names: Mapping[int, str]) -> None:
        """See ``Recorder``."""
        self._names = dict(names)

    def begun(self, trace: RequestTrace) -> None:
        """See ``Recorder``."""
        context = self._propagate.extract(dict(trace.headers or {}))
        span = self._start("omni_request", trace.opened, context, self._api.SpanKind.SERVER)
        self._open[trace] = {None: span}

    def entered(self, trace: RequestTrace, stage_id: int, at: float) -> Mapping[str, str]:
        """See ``Recorder``."""
        spans = self._open[trace]
        span = self._start(self._names.get(stage_id, f"stage {stage_id}"), at, self._inside(spans[None]))
        span.set_attribute("omni.stage_id", stage_id)
        spans[stage_id] = span
        headers: dict[str, str] = {}
        self._propagate.inject(headers, self._inside(span))
        return headers

    def record(self, trace: RequestTrace) -> None:
        """See ``Recorder``."""
        spans = self._open.pop(trace)
        for stage_id, slices in trace.tree().items():
            for part in slices:
                self._send(part, spans[stage_id])
            spans[stage_id].end(self._ns(max([trace.stages[stage_id].submitted, *(part.end for part in slices)])))
        request = spans[None]
        for name, value in trace.facts().items():
            request.set_attribute(f"omni.{name}", value)
        if trace.error is not None:
            request.set_status(self._api.Status(self._api.StatusCode.ERROR, trace.error.message))
        request.end(self._ns(trace.ended))

    def close(self) -> None:
        """See ``Recorder``."""
        self._tracer.span_processor.force_flush(FLUSH_MS)

    def _send(self, part: Slice, parent: Any) -> None:
        span = self._start(part.name, part.begin, self._inside(parent))
        span.set_attributes({f"omni.{name}": value for name, value in part.facts.items()})
        if self._detailed:
            for inner in part.inner:
                self._send(inner, span)
        span.end(self._ns(part.end))

    def _start(self, name: str, at: float, context: Any, kind: Any = None) -> Any:
        kind = self._api.SpanKind.INTERNAL if kind is None else kind
        return self._tracer.start_span(name, context=context, kind=kind, start_time=self._ns(at))

    def _inside(self, span: Any) -> Any:
        return self._api.set_span_in_context(span)

    def _ns(self, at: float) -> int:
        return int(at * 1e9) + self._shift
