"""A collector of OpenTelemetry traces, as users run one: it takes spans over gRPC or over HTTP and keeps them."""

from __future__ import annotations

import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc


class Collector:
    """Listens on two free ports of this machine."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._lock = threading.Lock()
        collector = self

        class Servicer(service_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                collector.take(request)
                return service.ExportTraceServiceResponse()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = service.ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                collector.take(request)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                return

        self._grpc = grpc.server(futures.ThreadPoolExecutor(2))
        service_grpc.add_TraceServiceServicer_to_server(Servicer(), self._grpc)
        self.grpc_url = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http_url = f"http://127.0.0.1:{self._http.server_address[1]}/v1/traces"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def take(self, request: Any) -> None:
        """Keep the spans of a message."""
        with self._lock:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans.extend(scope.spans)

    def trace(self, trace_id: bytes) -> dict[str, list[Any]]:
        """The spans of one trace, by name."""
        found: dict[str, list[Any]] = {}
        with self._lock:
            for span in self.spans:
                if span.trace_id == trace_id:
                    found.setdefault(span.name, []).append(span)
        return found

    def close(self) -> None:
        """Stop listening."""
        self._grpc.stop(None)
        self._http.shutdown()
        self._http.server_close()
