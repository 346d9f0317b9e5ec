"""`superresolve`: check the cube, map a function of blocks over it, put the labels back.

The only place where labels and blocks meet. Everything stays lazy: building costs no reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import dask.array as da
import numpy as np
import xarray as xr

from .. import __version__
from ..sentinel2.bands import BANDS
from ..sentinel2.catalog import complete
from ..sentinel2.grids import DIMS, FINE_DIMS, SIXTY, TWENTY, Bands, read_crs
from ..sentinel2.layouts import band_attrs, lasting_attrs, place
from ..sentinel2.native import two_grids
from ..sentinel2.provenance import OF_A_DATE, loaded
from ..sentinel2.search import DEFAULT_COLLECTION
from .arrays import check_bands, check_cube, stack_bands
from .classical import N_CLUSTERS, Bicubic, ClusterGuide, ClusterRegression, HighPassModulation, fit_clusters
from .devices import choose_device
from .likeness import Choice, like_the_store
from .missing import FILL_RADIUS
from .overlap import map_windows
from .predictor import Consistency, Precision, Predictor

if TYPE_CHECKING:
    from dask.delayed import Delayed

    from ..network import Checkpoint, GINetConfig
    from ..sentinel2.search import Catalog

Method = Literal["bicubic", "glp_hpm", "regression"]
SHA256 = "ginet_weights_sha256"
METHODS: dict[Method, type[Bicubic]] = {
    "bicubic": Bicubic,
    "glp_hpm": HighPassModulation,
    "regression": ClusterRegression,
}


def superresolve(
    ds: xr.Dataset | xr.DataArray,
    *,
    weights: str | Path | Checkpoint | None = "default",
    bands: Literal["20m", "all"] = "20m",
    weights_60m: str | Path | Checkpoint | None = None,
    depth: int | str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    consistency: Consistency = "none",
    self_ensemble: bool = False,
    resources: Mapping[str, float] | None = None,
    catalog: Catalog | None = None,
    collection: str = DEFAULT_COLLECTION,
    sign: Callable[[Any], Any] | None = None,
    scale: float | None = None,
    offset: float = 0.0,
    nodata: float | None = 0,
    like_store: Any = None,
) -> xr.Dataset:
    """Return all bands of a two-grid cube on its 10 m grid, lazily.

    Parameters
    ----------
    ds : Dataset or DataArray
        Two-grid cube: B02 B03 B04 B08 with dims ``[time,] y, x`` and B05 B06 B07 B8A B11 B12 with ``[time,] y_20m,
        x_20m``, float reflectance, chunked in any way: on processors large blocks are worked on in parts. NaN is
        missing, and so is what is infinite or beyond 100 of either sign, as fill values are. A 10 m cube whose 20 m
        bands were repeated by nearest neighbour is taken apart first, see `xr_ginet.to_native`.
    weights : str, Path, Checkpoint or None
        Name of a packaged checkpoint or path of a safetensors file, which every worker must be able to read, or is sent
        as `Predictor` tells. ``"default"`` is ``"ginet"`` on CUDA devices, else ``"ginet-s"``. None is without
        training: the detail of ``guide(method="kmeans")`` by back-projection, see `classical`.
    bands : {"20m", "all"}
        ``"all"``: B01 and B09 at 10 m too, from ``y_60m, x_60m``.
    weights_60m : str, Path, Checkpoint or None
        Likewise for them, of a network for factor 6 (``xr-ginet train`` with ``resolution = 60``). None is without
        training, as with ``weights=None``, which has been more accurate (``benchmarks/quality.md``).
    depth : "exact", "auto" or int, optional
        Overlap of the blocks in 10 m pixels, by default ``"exact"``; what fills gaps is read on top of it. ``"exact"``
        is what the network can see, so that the result does not depend on the chunks: on processors, with float32 and
        bfloat16, not by a bit. Chunks of less than 64 pixels are then computed with more around them. ``"auto"`` is
        faster: with the packaged
        weights and float32 the result depends on chunks by less than 1e-5, a tenth of a digital number, measured on
        real scenes (``benchmarks/depths.md``); what is rounded to 16 bits differs near chunk edges by its rounding.
        Weights whose card tells no depth get the exact one. An even number is wrong near chunk edges by what the
        network sees beyond it.
    device : str
        A torch device, or ``"auto"``: CUDA where the graph is built with it, else the CPU. With ``resources`` a device
        need not be where the graph is built.
    precision : {"auto", "float32", "float64", "mixed", "bfloat16"}
        Of the network's arithmetic and of its output. ``"mixed"`` is for CUDA devices, and what ``"auto"`` is there:
        float32 but for most convolutions, which have 16 bits; up to ten times as fast. On a real scene it differed from
        float64 by less than 1e-3, its RMS by less than 1e-4 (``benchmarks/gpu/measured.md``). ``"bfloat16"`` is for
        processors, and what ``"auto"`` is on those whose instructions multiply such numbers faster (AMX; AMD's since
        Zen 4): float32 but for the residual blocks. It changes RMSE by less than 0.1 % (``benchmarks/bfloat16.md``).
        ``"auto"`` is decided where the graph is built, by what the machine is and always alike; a cluster's workers
        compute what was decided.
    consistency : {"none", "exact"}
        ``"exact"``: at the end the mean of each 2 × 2 block is made to equal the 20 m pixel that it came from.
    self_ensemble : bool
        Average the results of the eight symmetries of the square: a little more accurate, eight times the work.
    resources : mapping, optional
        What a block's network takes of a worker, as ``{"GPU": 1}``, on a cluster some of whose workers were started
        with such resources: the network runs only there, everything else anywhere. Write with `to_zarr`, or compute
        with Dask's ``optimization.fuse.active`` set to False: otherwise Dask forgets it.
    catalog, collection, sign : optional
        Where to find the 20 m bands of a cube that holds only the 10 m ones, see `xr_ginet.open_stac`: the items of the
        same days over the same ground are searched, and what is missing is loaded from them.
    scale, offset, nodata : float, optional
        For bands that hold digital numbers, as in `pair`.
    like_store : str, Path, zarr store or icechunk.Repository, optional
        Where the result will be appended or resumed. Of the cube there, if there is one, ``weights`` (by their hash),
        ``depth`` and ``precision`` are taken over where they are not given here, and logged.

    Returns
    -------
    Dataset
        Dims ``[time,] y, x``: the 10 m bands as they came, the 20 m bands at 10 m, chunked in y and x as the first 10 m
        band. Coordinates, attributes and variables that are no bands, as ``SCL`` on ``y_20m, x_20m``, are kept, but for
        attributes that no longer hold, such as ``scale_factor``; bands of 60 m that are not super-resolved are left
        out. A pixel of a 20 m band is missing where its 20 m pixel or any 10 m band is; missing pixels around it were
        filled with the mean of the valid ones within 80 m, so values near a gap may differ from those without it.

    Raises
    ------
    ValueError
        If a band is missing, holds digital numbers or lies on the wrong grid; if the grids do not nest; if the depth
        is not a multiple of 2; if an option makes no sense without weights; if CUDA is asked for and absent, or
        a precision that is not for the device; if weights are not finite; if weights or precision of ``like_store`` are
        not to be had here. When computed: if the 20 m bands of a 10 m cube were interpolated, the median of a block of
        floats is far from any reflectance, or the result is not finite where nothing is missing.
    FileNotFoundError
        If there are no such weights.

    References
    ----------
    Pereira-Sánchez et al., arXiv 2508.04729.
    """
    if bands not in ("20m", "all"):
        raise ValueError(f"bands={bands!r}: must be '20m', or 'all' for those of 60 m too")
    if weights_60m is not None and bands != "all":
        raise ValueError("weights_60m is for the 60 m bands, which are left out. Type bands='all'")
    choice = Choice(weights, depth, device, precision)
    weights, depth, device, precision = choice if like_store is None else like_the_store(like_store, choice)
    depth = "exact" if depth is None else depth
    ds = two_grids(ds, scale=scale, offset=offset, nodata=nodata)
    checkpoint = None if weights is None else resolve_weights(weights, device)
    native = TWENTY if checkpoint is None else bands_of_network(checkpoint.config)
    if catalog is not None:
        ds = complete(ds, catalog, collection=collection, sign=sign, bands=native.coarse)
    if checkpoint is None and (depth, device, self_ensemble, resources) != ("exact", "auto", False, None):
        raise ValueError(
            f"depth={depth!r}, device={device!r}, self_ensemble={self_ensemble}, resources={resources}: weights=None "
            "has no network that these are for. Leave them out, or name weights"
        )
    network = Network(device, precision, consistency, self_ensemble, resources)
    if checkpoint is None:
        plain: Precision = "float32" if precision == "auto" else precision
        result = classical(ds, "regression", precision=plain, consistency=consistency)
    else:
        result = _by_network(ds, checkpoint, depth, network)
    return result if bands == "20m" else _with_sixty(result, ds, weights_60m, depth, network)


class Network(NamedTuple):
    """How networks are run."""

    device: str
    precision: Precision
    consistency: Consistency
    self_ensemble: bool
    resources: Mapping[str, float] | None

    def of(self, checkpoint: Checkpoint, depth: int) -> Predictor:
        """Return the network of a checkpoint as a function of blocks that overlap by ``depth``."""
        return Predictor.of(
            checkpoint,
            device=self.device,
            precision=self.precision,
            consistency=self.consistency,
            self_ensemble=self.self_ensemble,
            depth=depth,
            elsewhere=self.resources is not None,
        )


def _with_sixty(
    result: xr.Dataset, ds: xr.Dataset, weights: str | Path | Checkpoint | None, depth: int | str, network: Network
) -> xr.Dataset:
    """Return a result with the 60 m bands of its cube at 10 m beside its own, in the order of wavelengths."""
    if weights is None:
        precision: Precision = "float64" if network.precision == "float64" else "float32"
        sixty = classical(ds, "regression", bands=SIXTY, precision=precision, consistency=network.consistency)
        told = {"ginet_method_60m": "regression"}
    else:
        checkpoint = resolve_weights(weights)
        if bands_of_network(checkpoint.config) != SIXTY:
            raise ValueError(
                f"weights_60m={checkpoint.name!r} are for {', '.join(checkpoint.config.bands)} and factor "
                f"{checkpoint.config.factor}; {', '.join(SIXTY.coarse)} and factor 6 are needed. Train some with "
                "resolution = 60, see xr_ginet.training.run, or leave weights_60m out"
            )
        sixty = _by_network(ds, checkpoint, depth if depth == "auto" else "exact", network)
        told = {f"{key}_60m": sixty.attrs[key] for key in ("ginet_weights", SHA256, "ginet_depth")}
        told |= {"ginet_method_60m": "network"}
    both = result.assign({name: sixty[name] for name in SIXTY.coarse}).assign_attrs(told)
    return _in_order(both)


def _by_network(ds: xr.Dataset, checkpoint: Checkpoint, depth: int | str, network: Network) -> xr.Dataset:
    provenance = {
        "ginet_weights": checkpoint.name,
        SHA256: checkpoint.sha256,
        "ginet_degradation": str(checkpoint.card.get("degradation", "unknown")),
        "ginet_self_ensemble": int(network.self_ensemble),  # attributes in netCDF and Zarr v2 know no booleans
    }
    bands, pixels = bands_of_network(checkpoint.config), resolve_depth(depth, checkpoint)
    function = network.of(checkpoint, pixels)
    return _map_bands(ds, function, bands, depth=pixels, provenance=provenance, resources=network.resources)


def classical(
    ds: xr.Dataset,
    method: Method,
    *,
    bands: Bands = TWENTY,
    precision: Precision = "float32",
    consistency: Consistency = "none",
) -> xr.Dataset:
    """Return all bands of a two-grid cube on its 10 m grid by a method without training, lazily.

    Parameters
    ----------
    ds : Dataset
        As in `superresolve`.
    method : {"bicubic", "glp_hpm", "regression"}
        Interpolation of the coarse bands; high-pass modulation by an intensity synthesised for each band (GLP-HPM); or
        the guide that is regressed from the 10 m bands per cluster, corrected by back-projection. The last two fit
        their regression to the whole cube, all times together: one more reading of it, when the result is computed.
    bands : Bands
        Which bands, from which resolution; by default those of 20 m.
    precision : {"float32", "float64"}
        Of the arithmetic and of the output.
    consistency
        As in `superresolve`.

    Raises
    ------
    ValueError
        If there is no such method, or the cube is not fit, as in `superresolve`.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if precision not in ("float32", "float64") or consistency not in ("none", "exact"):
        raise ValueError(
            f"precision={precision!r}, consistency={consistency!r}: must be 'float32' or 'float64', 'none' or 'exact'"
        )
    check_cube(ds, bands)
    function = METHODS[method](bands.factor, _gains(bands), precision, consistency)
    parameters = () if method == "bicubic" else (_fit(ds, bands),)
    provenance = {"ginet_weights": "none", "ginet_method": method, "ginet_degradation": "mtf"}
    return _map_bands(ds, function, bands, depth=function.depth, provenance=provenance, parameters=parameters)


def _gains(bands: Bands) -> tuple[float, ...]:
    return tuple(BANDS[name].mtf_gain for name in bands.coarse)


def _fit(ds: xr.Dataset, bands: Bands) -> Delayed:
    """Return the regression of the coarse bands on the 10 m bands, as tasks that read the cube."""
    fine, coarse = stack_bands(ds, bands.fine, FINE_DIMS), stack_bands(ds, bands.coarse, bands.coarse_dims)
    return fit_clusters(fine, coarse, factor=bands.factor, gains=_gains(bands), n_clusters=N_CLUSTERS)


def _map_bands(
    ds: xr.Dataset,
    function: Predictor | Bicubic,
    bands: Bands,
    *,
    depth: int,
    provenance: Mapping[str, object],
    parameters: tuple[Delayed, ...] = (),
    resources: Mapping[str, float] | None = None,
) -> xr.Dataset:
    """Return the fine bands as they came and the function's output beside them, with labels and attributes."""
    check_cube(ds, bands)
    result = map_windows(
        function,
        stack_bands(ds, bands.fine, FINE_DIMS),
        stack_bands(ds, bands.coarse, bands.coarse_dims),
        factors=(1, bands.factor),
        depth=depth + FILL_RADIUS * bands.factor,
        n_bands=len(bands.coarse),
        dtype=function.dtype,
        parameters=parameters,
        resources=resources,
        by_part=isinstance(function, Predictor),
        least=function.least if isinstance(function, Predictor) else 0,
    )
    cube = _without_coarse(ds, bands)
    first = cube[bands.fine[0]].transpose(..., *FINE_DIMS)
    chunks = dict(zip(first.dims, result.chunks[:-3] + result.chunks[-2:], strict=True))
    for name in bands.fine:
        cube[name] = cube[name].chunk(chunks)
    for i, name in enumerate(bands.coarse):
        cube[name] = first.copy(data=result[..., i, :, :])
    for name in (*bands.fine, *bands.coarse):
        cube[name].attrs = band_attrs(name) | lasting_attrs(ds[name].attrs)
    for variable in cube.variables.values():
        variable.encoding = {}  # of the store that the cube was read from
    inherited = {k: v for k, v in lasting_attrs(ds.attrs).items() if k in OF_A_DATE or not str(k).startswith("ginet_")}
    cube = _in_order(cube).assign_attrs(
        {"title": "Sentinel-2, all bands at 10 m", "Conventions": "CF-1.10"}
        | inherited
        | dict(provenance)
        | {
            "ginet_depth": depth,
            "ginet_precision": function.precision,
            "ginet_consistency": function.consistency,
            "ginet_version": __version__,
        }
    )
    return loaded(place(cube, crs=read_crs(ds)))


def _without_coarse(ds: xr.Dataset, bands: Bands) -> xr.Dataset:
    """Return a cube without attributes, bands that are not fine, and grids on which nothing lies then."""
    cube = ds.drop_vars([name for name in ds.data_vars if name in BANDS and name not in bands.fine])
    used = {dim for variable in cube.data_vars.values() for dim in variable.dims}
    left = [dim for dims in DIMS.values() for dim in dims if dim in cube.dims and dim not in used]
    return cube.drop_dims(left).copy().drop_attrs(deep=False)


def _in_order(cube: xr.Dataset) -> xr.Dataset:
    """Return a cube whose bands are in the order of wavelengths, and before all else."""
    bands = [name for name in BANDS if name in cube]
    return cube[[*bands, *(name for name in cube.data_vars if name not in bands)]]


def guide(
    ds: xr.Dataset,
    *,
    method: Literal["learned", "kmeans"] = "learned",
    weights: str | Path | Checkpoint = "default",
    device: str = "auto",
) -> xr.DataArray:
    """Return the geometry guide drawn from the 10 m bands, lazily.

    Parameters
    ----------
    ds : Dataset
        Holds B02 B03 B04 B08 with dims ``[time,] y, x``, float reflectance; for ``"kmeans"`` the 20 m bands too.
    method : {"learned", "kmeans"}
        The network's own guide; or the 20 m bands regressed on the 10 m bands, one ridge regression per k-means cluster
        of spectra, fitted at 20 m to the whole cube (all times together; the fit reads it when the guide is computed).
    weights, device
        As in `superresolve`; of the learned guide.

    Returns
    -------
    DataArray
        ``guide ([time,] band, y, x)``, float32, one plane per 20 m band, unitless (``"kmeans"``: reflectance); chunked
        as the first 10 m band.

    Raises
    ------
    ValueError
        If there is no such method, the weights have no learned guide, or a band is missing or not fit.
    """
    if method == "kmeans":
        check_cube(ds, TWENTY)
        values = map_windows(
            ClusterGuide(),
            stack_bands(ds, TWENTY.fine, FINE_DIMS),
            factors=(1,),
            depth=0,
            n_bands=len(TWENTY.coarse),
            dtype="float32",
            parameters=(_fit(ds, TWENTY),),
        )
        return _label_guide(ds, values, TWENTY, {"ginet_method": "kmeans"})
    if method != "learned":
        raise ValueError(f"method={method!r}: must be 'learned' or 'kmeans'")
    checkpoint = resolve_weights(weights, device)
    config = checkpoint.config
    if config.guide != "learned":
        raise ValueError(f"the weights {checkpoint.name!r} have no learned guide")
    check_bands(ds, config.guide_bands, FINE_DIMS)
    if len({"time" in ds[name].dims for name in config.guide_bands}) > 1:
        raise ValueError("some of the 10 m bands have a time dimension and some have not")
    values = map_windows(
        Predictor.of(checkpoint, device=device).guide,
        stack_bands(ds, config.guide_bands, FINE_DIMS),
        factors=(1,),
        depth=3 + FILL_RADIUS * config.factor,  # three 3×3 convolutions
        n_bands=len(config.bands),
        dtype="float32",
    )
    attrs = {"ginet_weights": checkpoint.name, SHA256: checkpoint.sha256}
    return _label_guide(ds, values, bands_of_network(config), attrs)


def _label_guide(ds: xr.Dataset, values: da.Array, bands: Bands, attrs: dict[str, str]) -> xr.DataArray:
    first = ds[bands.fine[0]].transpose(..., *FINE_DIMS)
    return xr.DataArray(
        values,
        coords=dict(first.coords) | {"band": list(bands.coarse)},
        dims=(*first.dims[:-2], "band", *FINE_DIMS),
        name="guide",
        attrs={"long_name": "geometry guide", "units": "1"} | attrs | {"ginet_version": __version__},
    )


def resolve_weights(weights: str | Path | Checkpoint, device: str = "cpu") -> Checkpoint:
    """Return the checkpoint of a name, a path or itself; the default one depends on the device."""
    from ..network import Checkpoint, load_checkpoint
    from ..network.checkpoints import DEFAULT_ON_GPU

    if not isinstance(weights, Checkpoint | str | Path):
        raise TypeError(
            f"weights is a {type(weights).__name__}; a name, a path or a Checkpoint is needed. Store a network with "
            "xr_ginet.save_checkpoint(path, network) and pass the path"
        )
    if weights == "default" and choose_device(device).startswith("cuda"):
        return load_checkpoint(DEFAULT_ON_GPU)
    return weights if isinstance(weights, Checkpoint) else load_checkpoint(weights)


def resolve_depth(depth: int | str, checkpoint: Checkpoint) -> int:
    """Return how far around a block the network sees, in fine pixels: a multiple of the factor.

    ``"exact"`` is the receptive radius, ``"auto"`` the depth that the card tells.
    """
    config = checkpoint.config
    if depth in ("exact", "auto"):
        told = checkpoint.card.get("depth") if depth == "auto" else None
        radius = config.receptive_radius if told is None else int(told)
        return -(-radius // config.factor) * config.factor
    if isinstance(depth, bool) or not isinstance(depth, int | np.integer) or depth < 0 or depth % config.factor:
        raise ValueError(
            f"depth={depth!r}: must be 'exact', 'auto' or a number of 10 m pixels that is a multiple of {config.factor}"
        )
    return int(depth)


def bands_of_network(config: GINetConfig) -> Bands:
    """Return the bands that a network takes; raise where it takes more than a cube holds."""
    if config.guide == "external":
        raise ValueError(
            "these weights have guide='external': they need a guide that a cube does not hold. Use the network itself"
        )
    return Bands(config.guide_bands, config.bands, config.factor)
