"""The GINet network: the function itself, in torch alone."""

from .authors import from_authors
from .checkpoints import Checkpoint, available_weights, load_checkpoint, save_checkpoint
from .ginet import GINet, GINetConfig

__all__ = [
    "Checkpoint",
    "GINet",
    "GINetConfig",
    "available_weights",
    "from_authors",
    "load_checkpoint",
    "save_checkpoint",
]
