"""The network over a lazy cube: overlapping windows, prediction, labels."""

from .pipeline import guide, superresolve

__all__ = ["guide", "superresolve"]
