"""Sentinel-2 at 10 m in all bands: GINet over lazy xarray cubes.

Importing registers ``ds.ginet`` and loads neither torch nor a catalogue client.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("xr-ginet")

if TYPE_CHECKING:
    from .cog import to_cog
    from .growing import status
    from .mapping import guide, superresolve
    from .network import GINet, GINetConfig, from_authors, load_checkpoint, save_checkpoint
    from .overviews import build_overviews
    from .sentinel2.catalog import open_stac
    from .sentinel2.layouts import pair
    from .sentinel2.native import to_native
    from .sentinel2.safe import open_safe
    from .sentinel2.scl import mask_clouds
    from .store import to_zarr

_HOMES = {
    "GINet": "xr_ginet.network",
    "GINetConfig": "xr_ginet.network",
    "build_overviews": "xr_ginet.overviews",
    "from_authors": "xr_ginet.network",
    "guide": "xr_ginet.mapping",
    "load_checkpoint": "xr_ginet.network",
    "mask_clouds": "xr_ginet.sentinel2.scl",
    "open_safe": "xr_ginet.sentinel2.safe",
    "open_stac": "xr_ginet.sentinel2.catalog",
    "pair": "xr_ginet.sentinel2.layouts",
    "save_checkpoint": "xr_ginet.network",
    "status": "xr_ginet.growing",
    "superresolve": "xr_ginet.mapping",
    "to_cog": "xr_ginet.cog",
    "to_native": "xr_ginet.sentinel2.native",
    "to_zarr": "xr_ginet.store",
}
"""Where each public name lives; it is imported when first asked for."""

__all__ = [
    "GINet",
    "GINetConfig",
    "__version__",
    "build_overviews",
    "from_authors",
    "guide",
    "load_checkpoint",
    "mask_clouds",
    "open_safe",
    "open_stac",
    "pair",
    "save_checkpoint",
    "status",
    "superresolve",
    "to_cog",
    "to_native",
    "to_zarr",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'xr_ginet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


from . import accessor as _accessor  # noqa: E402, F401 - registers ds.ginet
