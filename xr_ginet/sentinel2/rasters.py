"""stackstac's reader of rasters, with patience: see `patience`."""

from __future__ import annotations

import logging
import os
from typing import Any

import stackstac
from stackstac.rio_reader import AutoParallelRioReader

from .addresses import without_secrets
from .patience import patiently

LIMITS = {
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_LOW_SPEED_TIME": 20,
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
    "GDAL_CACHEMAX": 256 * 2**20,
}
"""Seconds to connect; seconds without a byte per second after which a transfer has stalled; bytes that GDAL keeps, by
default a twentieth of the machine's memory. What the environment says wins."""


class _WithoutSecrets(logging.Filter):
    """Let records of a log pass without what is secret in the URLs that they name."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


for _name in ("rasterio._base", "rasterio._env", "rasterio._err"):  # where GDAL's errors are logged, with signed URLs
    logging.getLogger(_name).addFilter(_WithoutSecrets())


def gdal_env() -> Any:
    """Return stackstac's settings of GDAL, with limits to how long a server may keep silent, and to what is kept."""
    limits = {name: value for name, value in LIMITS.items() if name not in os.environ}
    return stackstac.DEFAULT_GDAL_ENV.updated(always=limits)


class PatientReader(AutoParallelRioReader):
    """Reader of one raster that asks again where that is not on this machine."""

    def read(self, window: Any, **options: Any) -> Any:
        """Return a window's pixels.

        Raises
        ------
        RuntimeError
            If they cannot be read; it names the file and the window, without what is secret in a signed URL.
        """
        try:
            return patiently(self.url, RuntimeError)(self._read_afresh, window, options)
        except RuntimeError as error:
            raise RuntimeError(without_secrets(str(error))) from None

    def _read_afresh(self, window: Any, options: dict[str, Any]) -> Any:
        try:
            return super().read(window, **options)
        except RuntimeError:
            self.close()
            # What GDAL keeps of the file may be what was wrong with it.
            self.gdal_env: Any = self.gdal_env.updated(always={"CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/"})
            raise
