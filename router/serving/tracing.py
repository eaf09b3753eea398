"""Spans of OpenTelemetry: one for each decision, of which the server's own spans are children.

There are none unless its packages are installed (extra `trace`) and an endpoint is set in the environment.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from router.serving.names import AUTO
from router.system.version import own_version

log = logging.getLogger(__name__)
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# Attributes by what a decision tells, here alone, since the conventions for language models are not settled.
ATTRIBUTES = {
    "model": "gen_ai.response.model", "margin": "router.margin", "fits": "router.fits",
    "low_margin": "router.low_margin", "request_id": "router.request_id",
}  # fmt: skip


def tracer() -> Any:
    """Sends spans to the endpoint in the environment; None if there is none, or no OpenTelemetry."""
    if not (given := next(filter(os.environ.get, ENDPOINTS), None)):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("%s is set, but no spans are sent; pip install 'proto-route[trace]'", given)
        return None
    name = os.environ.get("OTEL_SERVICE_NAME", "proto-route")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("proto-route", own_version())


def traced(
    tracer: Any, headers: Mapping[str, str], decision: Mapping[str, Any], began: int
) -> dict[str, str]:
    """Records a decision as a span of the client's trace, if it has one.

    Args:
        headers: of the client's request.
        decision: as the client is told of it.
        began: when, in nanoseconds since 1970.

    Returns:
        The headers by which the server's spans become children of this one.
    """
    from opentelemetry import propagate, trace

    attributes = {name: decision[key] for key, name in ATTRIBUTES.items()} | {"gen_ai.request.model": AUTO}
    above = propagate.extract(headers)
    span = tracer.start_span("route", above, trace.SpanKind.SERVER, attributes, start_time=began)
    span.end()
    below: dict[str, str] = {}
    propagate.inject(below, trace.set_span_in_context(span, above))
    return below
