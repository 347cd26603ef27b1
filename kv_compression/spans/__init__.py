"""Which text is compressed: samplers that choose spans, and the plan by which a run uses them."""

from kv_compression.spans.exact import exact_spans
from kv_compression.spans.paper import paper_spans

__all__ = ["exact_spans", "paper_spans"]
