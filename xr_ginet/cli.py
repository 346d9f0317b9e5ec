"""``xr-ginet``: the library from a shell. Each command gathers its arguments and makes one call."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .paths import expanded

if TYPE_CHECKING:
    from .mapping.likeness import Choice

SPEAKING = (ValueError, OSError, RuntimeError, ImportError)
"""Errors that the library raises, with text for users."""

OPTIONS = {
    "Type mode='w'": "Use --overwrite",
    "type max_items=": "use --max-items ",
    "Type max_items=": "Use --max-items ",
}
"""What is typed in the shell in place of an argument that an error names."""

app = typer.Typer(help="Sentinel-2 at 10 m in all bands.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def superresolve(
    catalog: Annotated[
        str, typer.Argument(help="URL of a STAC API, or a JSON file with an item or an item collection.")
    ],
    store: Annotated[str, typer.Argument(help="Zarr store to write: a path or an fsspec URL.")],
    bbox: Annotated[
        tuple[float, float, float, float] | None, typer.Option(help="West, south, east, north in degrees.")
    ] = None,
    datetime: Annotated[str | None, typer.Option(help="Date or range, such as 2024-06-01/2024-06-30.")] = None,
    collection: Annotated[str, typer.Option(help="Collection to search.")] = "sentinel-2-l2a",
    max_items: Annotated[int | None, typer.Option(help="At most that many items.")] = None,
    mask_clouds: Annotated[
        bool, typer.Option("--mask-clouds", help="Leave out what the scene classification calls cloudy.")
    ] = False,
    weights: Annotated[str, typer.Option(help="Packaged checkpoint, or path of a .safetensors file.")] = "default",
    bands: Annotated[
        Literal["20m", "all"], typer.Option(help="'20m', or 'all': B01 and B09 from 60 m to 10 m too.")
    ] = "20m",
    weights_60m: Annotated[
        str | None, typer.Option(help="For them, a .safetensors file; without it by regression.")
    ] = None,
    chunks: Annotated[int, typer.Option(help="Pixels per chunk and axis at 10 m.")] = 1024,
    depth: Annotated[str | None, typer.Option(help="'exact' (the default), 'auto', or overlap in 10 m pixels.")] = None,
    device: Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")] = "auto",
    precision: Annotated[
        Literal["auto", "float32", "float64", "mixed", "bfloat16"],
        typer.Option(help="Of the arithmetic; mixed is for CUDA, bfloat16 for processors."),
    ] = "auto",
    consistency: Annotated[
        Literal["none", "exact"], typer.Option(help="'none', or 'exact': 2 × 2 means equal the 20 m input.")
    ] = "none",
    self_ensemble: Annotated[bool, typer.Option("--self-ensemble", help="Average eight symmetries.")] = False,
    dtype: Annotated[
        Literal["float32", "uint16"], typer.Option(help="uint16 is scaled, as Sentinel-2's own.")
    ] = "uint16",
    zarr_format: Annotated[int, typer.Option(help="3 or 2.")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing store.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Write date by date, and skip what the store holds completely. Weights, depth and precision that are "
            "not given are those of the store.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Super-resolve what a STAC catalogue holds of an area, into a Zarr store."""
    from . import open_stac
    from . import superresolve as superresolve_cube
    from .mapping.likeness import Choice, like_the_store
    from .sentinel2.bands import layers_for

    with _errors_as_messages():
        cube = open_stac(
            _items_of(catalog),
            collection=collection,
            bbox=bbox,
            datetime=datetime,
            max_items=max_items,
            chunks=chunks,
            bands=layers_for(bands, mask_clouds=mask_clouds),
        )
        if mask_clouds:
            cube = cube.ginet.mask_clouds()
        _log_to_shell(quiet=quiet)
        choice = Choice(weights, int(depth) if depth and depth.isdigit() else depth, device, precision)
        if resume:
            choice = like_the_store(store, choice)
        result = superresolve_cube(
            cube,
            bands=bands,
            weights_60m=weights_60m,
            **choice._asdict(),
            consistency=consistency,
            self_ensemble=self_ensemble,
        )
        if dry_run:
            _print_plan(cube, result, store, choice)
            return
        result.ginet.to_zarr(
            store,
            mode="w" if overwrite else None,
            resume=resume,
            dtype=dtype,
            zarr_format=zarr_format,
            progress=not quiet,
        )
        typer.echo(f"wrote {store}: {_sizes(result)}")


@app.command()
def overviews(
    store: Annotated[str, typer.Argument(help="A cube in a group, as cube.zarr/10m.")],
    levels: Annotated[int | None, typer.Option(help="By default until 512 pixels are left.")] = None,
) -> None:
    """Write overviews beside a cube, for web maps; again after it has grown."""
    from . import build_overviews

    with _errors_as_messages():
        names = build_overviews(store, levels=levels)
        typer.echo(f"wrote {', '.join(names) or 'no overview: the cube is small'} beside {store}")


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="TOML file: catalogue, areas, dates, store, cluster; see xr_ginet.jobs.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the summary, and what failed.")] = False,
) -> None:
    """Run a batch job; again to go on with it. Exit code 0: all is complete, 3: some dates or areas failed."""
    with _errors_as_messages():
        from . import jobs

        _log_to_shell(quiet=quiet)
        read = jobs.Job.from_toml(job)
        if dry_run:
            for planned in read.area:
                typer.echo(f"area     {planned.name}")
                opened = jobs.open_area(read, planned)
                _print_plan(opened.cube, opened.result, read.store_of(planned), opened.choice)
            return
        report = jobs.run(read)
    for area in report.areas:
        typer.echo(f"{area.area}: {area.state}, {area.store}" + (f": {area.error}" if area.error else ""))
    typer.echo(f"{report.state}: " + ", ".join(f"{number} dates {state}" for state, number in report.counts.items()))
    if report.state != "complete":
        raise typer.Exit(3)


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="TOML file: network, cubes, patches, fit; see xr_ginet.training.run.")],
    folder: Annotated[Path, typer.Option(help="For logs, pictures, the state to resume from, and the weights.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train weights on cubes at reduced scale; run again to go on after an interruption."""
    with _errors_as_messages():
        from .training.run import Run
        from .training.run import train as train_run

        command = f"xr-ginet train --config {config} --folder {folder}"
        written = train_run(Run.from_toml(config), folder, progress=not quiet, command=command)
        typer.echo(f"wrote {written.path}: {written.card['rmse_validation']} digital numbers of validation RMSE")


@app.command()
def evaluate(
    cube: Annotated[str, typer.Argument(help="Two-grid cube in Zarr, URL of a STAC API, or a JSON file of items.")],
    model: Annotated[
        list[str] | None, typer.Option(help="bicubic, glp_hpm, regression or weights; may be repeated.")
    ] = None,
    scale: Annotated[
        Literal["reduced", "full"], typer.Option(help="'reduced': Wald's protocol. 'full': without reference.")
    ] = "reduced",
    degradation: Annotated[Literal["mtf", "box"], typer.Option(help="The instrument's blur or block means.")] = "mtf",
    border: Annotated[int, typer.Option(help="20 m pixels left out on each side.")] = 8,
    bbox: Annotated[
        tuple[float, float, float, float] | None, typer.Option(help="West, south, east, north in degrees.")
    ] = None,
    datetime: Annotated[str | None, typer.Option(help="Date or range, such as 2024-06-01/2024-06-30.")] = None,
    collection: Annotated[str, typer.Option(help="Collection to search.")] = "sentinel-2-l2a",
    out: Annotated[Path | None, typer.Option(help="Also write the table: .json, .csv or .md.")] = None,
) -> None:
    """Tell how good models are on a cube."""
    with _errors_as_messages():
        from . import evaluation, open_stac
        from .sentinel2.arrays import open_cube

        if out and out.suffix not in evaluation.WRITERS:
            raise ValueError(f"--out {out}: must end in {', '.join(evaluation.WRITERS)}")
        if _is_store(cube) and not cube.startswith("http"):
            ds = open_cube(expanded(cube))
        else:
            ds = open_stac(_items_of(cube), collection=collection, bbox=bbox, datetime=datetime)
        table = evaluation.evaluate(
            ds, model or ["bicubic", "default"], scale=scale, degradation=degradation, border=border
        )
        typer.echo(evaluation.to_markdown(table))
        if out:
            expanded(out).write_text(evaluation.WRITERS[out.suffix](table) + "\n", encoding="utf-8")


@app.command()
def info(target: Annotated[str, typer.Argument(help="Zarr store, packaged checkpoint or .safetensors file.")]) -> None:
    """Tell what a cube or a checkpoint says of itself."""
    with _errors_as_messages():
        description = _describe_store(target) if _is_store(target) else _describe_weights(target)
        typer.echo(json.dumps(description, indent=2, default=str))


def _log_to_shell(*, quiet: bool) -> None:
    """Show what the library logs: warnings, or all of it."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("xr_ginet").setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """End the program with an error's message on one line, without secrets, and exit code 1; wrong usage exits with 2.

    ``XR_GINET_TRACEBACK=1`` in the environment shows where an error was raised.
    """
    from pystac_client.exceptions import APIError

    from .sentinel2.addresses import failure

    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("XR_GINET_TRACEBACK"):
            raise
        message = failure(error)
        if isinstance(error, (*SPEAKING, APIError)):  # which say what is wrong, and need not say what they are
            message = message.partition(": ")[2] or message
        else:
            message += ". XR_GINET_TRACEBACK=1 before the command shows where; please report it"
        for argument, option in OPTIONS.items():
            message = message.replace(argument, option)
    else:
        return
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _items_of(catalog: str) -> Any:
    """Return a URL as it is, and the items of a JSON file."""
    from .sentinel2.addresses import failure

    path = Path(expanded(catalog))
    if "://" in catalog:
        return catalog
    if not path.is_file():
        raise FileNotFoundError(f"{catalog} is neither the URL of a STAC API nor a file of STAC items")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{catalog} is no JSON ({failure(error)}): a STAC item or item collection is needed") from None
    items = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(items, list) or not all(map(_is_item, items)):
        raise ValueError(f"{catalog} holds no STAC item: a Feature with assets, or a FeatureCollection of them")
    for item in items:
        for asset in item["assets"].values():  # a relative link is relative to the file
            if "://" not in asset["href"] and not asset["href"].startswith("/"):
                asset["href"] = str(path.parent.resolve() / asset["href"])
    return items


def _is_item(item: Any) -> bool:
    """Return whether JSON has what is looked at here; the rest is for `read_item` to say."""
    if not isinstance(item, dict) or not {"assets", "properties", "id"} <= item.keys():
        return False
    assets = item["assets"]
    return isinstance(assets, dict) and all(
        isinstance(asset, dict) and isinstance(asset.get("href"), str) for asset in assets.values()
    )


def _print_plan(cube: Any, result: Any, store: str, choice: Choice) -> None:
    """Print what would be read and how it would be computed, the size of the graph and the memory of one block."""
    from .mapping.devices import choose_device
    from .sentinel2.addresses import without_secrets
    from .sentinel2.provenance import ITEMS, REASONS, of_all

    said = of_all(cube)
    tasks, chunks = len(result.__dask_graph__()), result["B05"].data.npartitions
    pixels = sum(band.size for band in cube.data_vars.values())
    device = "cpu" if choice.weights is None else choose_device(choice.device)
    for line in (
        f"items    {len(said[ITEMS])}: {', '.join(said[ITEMS][:3])}" + (" …" if len(said[ITEMS]) > 3 else ""),
        f"read     {2 * pixels / 1e9:.3g} GB of digital numbers; {said[REASONS]}",
        f"result   {_sizes(result)}, {result.nbytes / 1e9:.3g} GB as float32",
        f"graph    {tasks} tasks, {chunks} chunks, {tasks / chunks:.0f} tasks per chunk",
        f"device   {device}, precision {result.attrs['ginet_precision']}",
        *_network_lines(result, choice, device),
        f"store    {without_secrets(store)}, {'which exists; ' if _is_store(store) else ''}not written: dry run",
    ):
        typer.echo(line)


def _network_lines(result: Any, choice: Choice, device: str) -> Iterator[str]:
    """Return what a plan says of the network: its weights, and the memory of one block."""
    from .mapping.pipeline import resolve_weights
    from .mapping.predictor import LEAST, block_memory, worked_on

    depth = result.attrs["ginet_depth"]
    if choice.weights is None:
        yield f"weights  none: {result.attrs['ginet_method']}, depth {depth} pixels"
        return
    checkpoint = resolve_weights(choice.weights, choice.device)
    height, width = (min(result.sizes[d], max(LEAST, *result.chunksizes[d]) + 2 * depth) for d in ("y", "x"))
    how = checkpoint.config, height, width, result.attrs["ginet_precision"], device
    block, part = block_memory(*how), worked_on(*how)
    at_once = f"one block of {height} × {width} at a time"
    at_once += "" if part == (height, width) else f", in parts of at most {part[0]} × {part[1]}"
    whose = "per process" if device == "cpu" else f"of {device}'s memory"
    yield f"weights  {checkpoint.name} ({checkpoint.sha256[:12]}), depth {depth} pixels"
    yield f"memory   at most {block / 1e9:.2g} GB {whose} for the network, {at_once}"


def _sizes(ds: Any) -> str:
    return " × ".join(f"{dim} {size}" for dim, size in ds.sizes.items()) + f", {len(ds.data_vars)} bands"


def _is_store(target: str) -> bool:
    return "://" in target or any(
        (Path(expanded(target)) / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata")
    )


def _describe_store(target: str) -> dict[str, Any]:
    from .sentinel2.arrays import open_cube
    from .sentinel2.grids import Grid, read_crs
    from .sentinel2.provenance import of_all

    with open_cube(expanded(target)) as ds:
        crs = read_crs(ds)
        return {
            "sizes": dict(ds.sizes),
            "bands": list(ds.data_vars),
            "dtype": str(next(iter(ds.data_vars.values())).encoding["dtype"]),
            "chunks": next(iter(ds.data_vars.values())).encoding["chunks"],
            "times": [str(t)[:19] for t in ds["time"].values.ravel()[[0, -1]]] if "time" in ds.coords else None,
            "crs": crs.to_string() if crs else None,
            "transform": Grid.from_coords(ds).transform,
            "attributes": of_all(ds),
            "dates": _describe_dates(target, ds),
        }


def _describe_dates(target: str, ds: Any) -> list[dict[str, Any]] | None:
    """Return of each date what it was made from, and whether it is complete where the cube tells."""
    from .growing import CHECKSUM, status
    from .sentinel2.provenance import ITEMS

    if "time" not in ds.dims:
        return None
    complete = status(target).sel(time=ds["time"]).values.tolist() if CHECKSUM in ds else None
    items = [str(text) for text in ds[ITEMS].values] if ITEMS in ds.coords else None
    return [
        {"time": str(time)[:19]}
        | ({} if complete is None else {"complete": complete[i]})
        | ({} if items is None else {"items": items[i]})
        for i, time in enumerate(ds["time"].values)
    ]


def _describe_weights(target: str) -> dict[str, Any]:
    import dataclasses

    from .network import load_checkpoint

    checkpoint = load_checkpoint(target)
    return {
        "name": checkpoint.name,
        "path": checkpoint.path,
        "sha256": checkpoint.sha256,
        "receptive_radius": checkpoint.config.receptive_radius,
        "config": dataclasses.asdict(checkpoint.config),
        "card": checkpoint.card,
    }
