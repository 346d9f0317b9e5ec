"""The network over a lazy cube: overlapping windows, prediction, labels."""

from .pipeline import classical, guide, superresolve

__all__ = ["classical", "guide", "superresolve"]
