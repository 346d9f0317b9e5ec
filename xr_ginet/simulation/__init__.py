"""A simulated Sentinel-2 scene of farmland with its true 10 m reference, and its files as a catalogue would hold them.

Real Sentinel-2 has no truth at 10 m for the 20 m bands; a simulation does, at the price of being a simulation. What
this deliberately is not: a radiative transfer model. There is no atmosphere, no topography, no view angle, no cloud,
no misregistration, no detector striping. Figures measured here rank methods; they do not predict errors on real scenes.
"""

from .cogs import digital_numbers, write_cogs
from .scene import Scene, noise_sigma, simulate

__all__ = ["Scene", "digital_numbers", "noise_sigma", "simulate", "write_cogs"]
