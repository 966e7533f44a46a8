"""Pictures of networks and their training: PNGs by matplotlib, the network itself as an SVG."""

from sparsenet.pictures.comparison import draw_comparison, draw_errors
from sparsenet.pictures.filters import draw_filters, link_weights
from sparsenet.pictures.network import draw_graph
from sparsenet.pictures.training import (
    draw_confusion,
    draw_curves,
    draw_reliability,
    draw_samples,
)

__all__ = [
    "draw_comparison",
    "draw_confusion",
    "draw_curves",
    "draw_errors",
    "draw_filters",
    "draw_graph",
    "draw_reliability",
    "draw_samples",
    "link_weights",
]
