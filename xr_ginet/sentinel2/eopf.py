"""EOPF products as DataTree: to the two-grid cube, and back with new bands.

An EOPF product holds one group per resolution with bands under lower-case names. What its digital numbers mean is in
their attributes; whether xarray has applied that already is in their encoding.
"""

from __future__ import annotations

import xarray as xr

from .bands import BANDS_20M, SCL, band_name
from .layouts import pair

REFLECTANCE = "measurements/reflectance"
CLASSIFICATION = "conditions/mask/l2a_classification/r20m/scl"


def to_cube(tree: xr.DataTree) -> xr.Dataset:
    """Return the two-grid cube of an EOPF product, lazily where it is lazy.

    Parameters
    ----------
    tree : DataTree
        The whole product, as ``xr.open_datatree(url, engine="zarr", chunks={})`` opens it, decoded or not: scale and
        offset are applied once, and what is missing in the product is NaN also where xarray decoded it to -0.1.

    Returns
    -------
    Dataset
        Dims ``y, x`` and ``y_20m, x_20m``; float reflectance, and ``SCL`` where the product has it.

    Raises
    ------
    ValueError
        If the tree has no group of 10 m or 20 m reflectance, or digital numbers without scale.
    """
    fine, coarse = (_marked(_group(tree, name)) for name in ("r10m", "r20m"))
    if CLASSIFICATION in tree:
        coarse[SCL] = tree[CLASSIFICATION].variable
    if crs := _crs(tree):
        fine = fine.rio.write_crs(crs)
    return pair(fine, coarse)


def with_bands(tree: xr.DataTree, result: xr.Dataset) -> xr.DataTree:
    """Return the product with the 20 m bands of a super-resolved cube in its 10 m group; all else is as it was.

    The bands are float reflectance under the names that they have at 20 m; what made them is in their attributes.
    """
    fine, coarse = _group(tree, "r10m"), _group(tree, "r20m")
    first = next(v for v in fine.data_vars if band_name(str(v)))
    placed = {key: value for key, value in fine[first].attrs.items() if str(key).startswith("proj:")}
    made = {key: value for key, value in result.attrs.items() if str(key).startswith("ginet_")}
    new = {
        str(v): result[name].variable.copy(deep=False)
        for v in coarse.data_vars
        if (name := band_name(str(v))) in BANDS_20M and name in result
    }
    for band in new.values():
        band.attrs = dict(band.attrs) | placed | made
        band.encoding = {}
    product = tree.copy()
    product[f"{REFLECTANCE}/r10m"].dataset = fine.assign(new)
    return product


def _group(tree: xr.DataTree, resolution: str) -> xr.Dataset:
    path = f"{REFLECTANCE}/{resolution}"
    try:
        group = tree[path]
    except KeyError:
        group = None
    if not isinstance(group, xr.DataTree):
        names = [node.relative_to(tree) for node in tree.subtree if node is not tree]
        raise ValueError(
            f"no group {path} in the tree, which holds {', '.join(names[:8]) or 'no group'}. Pass the whole product: "
            "xr.open_datatree(url, engine='zarr', chunks={})"
        )
    return group.to_dataset(inherit=False)


def _marked(group: xr.Dataset) -> xr.Dataset:
    """Return a group whose bands say that they were digital numbers, also where their attributes were lost.

    So `pair` knows what the missing pixels of decoded ones are.
    """
    return group.assign({name: band.assign_attrs(units="digital_counts") for name, band in group.data_vars.items()})


def _crs(tree: xr.DataTree) -> str | int | None:
    """Return the CRS that the product's attributes state, in any of the places where versions have it."""
    properties = tree.attrs.get("stac_discovery", {}).get("properties", {})
    stated = (
        properties.get("proj:code"),
        properties.get("proj:epsg"),
        tree.attrs.get("other_metadata", {}).get("horizontal_CRS_code"),
    )
    return next((crs for crs in stated if crs), None)
