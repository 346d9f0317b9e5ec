"""Fitting a network's weights to patches: one loop, for training from nothing and for adapting to a scene.

The loop is Lightning's: CPU, GPU or several (DDP), mixed precision, logs, progress, checkpoints. What is ours is the
step: loss, schedule, gradients that are not finite, averaged weights, the temperature of the clusters, and where in
the data a run stands, so that an interrupted run goes on to the same bits as one that was not.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
import xarray as xr
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

try:
    import lightning.pytorch as pl
    from lightning.fabric.utilities.warnings import PossibleUserWarning
    from lightning.pytorch.plugins.io import TorchCheckpointIO
except ImportError as error:
    raise ImportError("training needs Lightning: pip install 'xr-ginet[train]'") from error

from ..folders import whole_file
from ..network import Checkpoint, GINet, load_checkpoint, save_checkpoint
from ..paths import expanded
from ..sentinel2.provenance import ITEMS, of_all
from .objective import relative_error
from .patches import Patches, PatchOptions, Sample

COLDEST = 0.05
"""Temperature at which clusters that become hard end."""

FALSE_COLOUR = {20: ("B12", "B8A", "B05"), 60: ("B09", "B09", "B01")}
"""Bands shown as red, green and blue, by their resolution."""


@dataclass(frozen=True)
class FitOptions:
    """How weights are fitted."""

    steps: int = 20_000
    """Optimiser steps; the learning rate falls to nothing over them, as a cosine."""
    batch_size: int = 8
    """Patches per step and process."""
    learning_rate: float = 7e-4
    """Largest learning rate of AdamW."""
    warm_up: int = 300
    """Steps over which the learning rate rises. Without it runs died at their start."""
    averaging: float = 0.999
    """Decay of the exponential average of the weights, which is what a run results in."""
    share: float = 1.0
    """What the average has of the result; the rest are the weights that the run started from. Between the two lie
    weights that do nearly as well as each where it does best."""
    gradient_norm: float = 1.0
    """Longer gradients are shortened to this; those that are not finite are left out."""
    learn_clusters: bool = True
    """Whether clusters with ``assignment="hard"`` are mixed while they are learned, at a temperature that falls.
    Without it they get no gradient and stay as they started: the authors' training, kept to compare with."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Of the arithmetic, in Lightning's words."""
    accelerator: str = "auto"
    """``cpu``, ``gpu`` or ``auto``."""
    devices: int = 1
    """Processes of that kind; more than one run under DDP, each with its own share of the chunks."""
    threads: int | None = None
    """Threads of torch per process; None leaves them."""
    validate_every: int = 500
    """Steps between validations."""
    save_every: int = 500
    """Steps between checkpoints to resume from."""
    log: Literal["csv", "tensorboard"] = "csv"
    """What writes loss, learning rate and validation error to the run's folder."""
    seed: int = 0
    """Of the weights to start with; the data have their own."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "devices", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging={self.averaging}: must be at least 0 and below 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: must be above 0 and at most 1")


class Stream(IterableDataset):
    """Patches pass after pass, each with the values of their dataset's state after it."""

    def __init__(self, patches: Patches) -> None:
        self.patches = patches

    def __iter__(self) -> Iterator[tuple[Sample, Tensor]]:
        began = False
        while True:
            empty = True
            for sample in self.patches:
                yield sample, torch.tensor(list(self.patches.state_dict().values()))
                empty = False
            if empty and began:
                raise ValueError(
                    f"no patch of {self.patches.options.size} pixels at {self.patches.options.resolution} m is free of "
                    "missing and cloudy pixels. Type a smaller size"
                )
            self.patches.set_epoch(self.patches.epoch + 1)
            began = True  # a pass that was taken up at its end is empty


class Fitting(pl.LightningModule):
    """A network being fitted; `result` has the exponential average of its weights, and its share of the start's."""

    def __init__(
        self, network: GINet, options: FitOptions, *, patches: Patches | None = None, pictures: Path | None = None
    ) -> None:
        super().__init__()
        self.patches = patches
        """What the network is fitted to; put where it stood when a run is gone on with."""
        self.start = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        self.network = network.train().requires_grad_(True)
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.averaging))
        self.average.requires_grad_(False)
        self.options = options
        self.pictures = pictures
        self.position = torch.zeros(1, 4)
        """State of the data after each patch of the latest batch."""
        self.losses: list[float] = []
        self.squares: list[Tensor] = []
        self.rmse: float | None = None
        """Of the latest validation, in digital numbers."""

    def result(self) -> GINet:
        """Return a network with the weights that the run results in so far.

        References
        ----------
        Wortsman et al. (2022), "Robust fine-tuning of zero-shot models".
        """
        network = copy.deepcopy(cast(GINet, self.average.module))
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                tensor.lerp_(self.start[name].to(tensor), 1 - self.options.share)
        return network

    def training_step(self, batch: tuple[Sample, Tensor], index: int) -> Tensor:
        sample, self.position = batch
        config = self.network.config
        if config.assignment == "hard" and config.guide == "learned" and self.options.learn_clusters:
            self.network.guide.temperature = COLDEST ** (self.global_step / self.options.steps)
        loss = relative_error(self.network(sample.ms, sample.hs).float(), sample.truth, sample.hs)
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Return the share of the learning rate at a step."""
        return min((step + 1) / self.options.warm_up, 0.5 * (1 + math.cos(math.pi * step / self.options.steps)))

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.gradient_norm)
        if not torch.isfinite(norm):
            optimizer.zero_grad()  # without gradients the step changes nothing

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.network)

    def on_validation_epoch_start(self) -> None:
        self.estimate = self.result().forward  # not the module, which would be one of this module and saved with it

    def validation_step(self, batch: Sample, index: int) -> None:
        estimate = self.estimate(batch.ms, batch.hs).float()
        border = min(8, batch.truth.shape[-1] // 4)
        inner = (..., slice(border, -border), slice(border, -border))
        self.squares.append(((estimate - batch.truth)[inner] ** 2).mean((2, 3)).sum(0))
        self.squares[-1] = torch.cat([self.squares[-1], torch.tensor([float(len(estimate))], device=self.device)])
        if index == 0 and self.pictures and self.trainer.is_global_zero:
            config = self.network.config
            shown = [config.bands.index(band) for band in FALSE_COLOUR[10 * config.factor]]
            hs, bicubic = (F.interpolate(batch.hs, scale_factor=config.factor, mode=m) for m in ("nearest", "bicubic"))
            path = self.pictures / f"step_{self.global_step:06d}.png"
            write_picture(path, [image[0, shown].cpu().numpy() for image in (hs, bicubic, estimate, batch.truth)])

    def on_validation_epoch_end(self) -> None:
        total = torch.stack(self.squares).sum(0) if self.squares else torch.zeros(len(self.network.config.bands) + 1)
        self.squares.clear()
        total = cast(Tensor, self.all_gather(total)).reshape(-1, len(total)).sum(0)
        self.rmse = float((total[:-1] / total[-1]).mean().sqrt() * 1e4)
        self.log("rmse", self.rmse, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mine = self.position[-1].tolist()
        positions: list[Any] = [mine]
        if _distributed():
            positions = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(positions, mine)
        checkpoint["positions"] = positions
        checkpoint["options"] = dataclasses.asdict(self.options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        now = dataclasses.asdict(self.options)
        if changed := {k: v for k, v in checkpoint["options"].items() if now.get(k) != v and k != "threads"}:
            asked = {key: now.get(key) for key in changed}
            raise ValueError(
                f"the run to go on with had {changed}, and {asked} is asked for. Go on with the same options, or name "
                "another folder"
            )
        if self.patches is not None:
            position = checkpoint["positions"][torch.distributed.get_rank() if _distributed() else 0]
            self.patches.load_state_dict(dict(zip(self.patches.state_dict(), position, strict=True)))


def fit(
    network: GINet,
    patches: Patches,
    options: FitOptions | None = None,
    *,
    validation: Patches | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Fitting:
    """Fit a network to patches, now; return it with its losses and what its weights became.

    Parameters
    ----------
    network : GINet
        Changed in place.
    patches : Patches
        Drawn pass after pass.
    options : FitOptions, optional
    validation : Patches, optional
        Their RMSE over all bands, in digital numbers without 8 pixels of border, is logged as ``rmse``.
    folder : Path, optional
        Where logs, pictures of a validation patch and the state to resume from are kept. A run whose folder has a
        state goes on from it, to the same weights as if it had not stopped.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If the network is for other bands than the patches, no patch is free of missing pixels, or a run in the folder
        had other options.
    """
    options = options or FitOptions()
    config = network.config
    if (config.guide_bands, config.bands, config.factor) != patches.bands:
        raise ValueError(
            f"the network is for {', '.join(config.bands)} and factor {config.factor}; patches are of "
            f"{', '.join(patches.bands.coarse)} and factor {patches.bands.factor}. Type resolution="
            f"{10 * config.factor} for the patches, or name other weights"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    module = Fitting(network, options, patches=patches, pictures=folder / "pictures" if folder else None)
    resume = folder / "last.ckpt" if folder and (folder / "last.ckpt").exists() else None
    with _quiet():
        trainer = pl.Trainer(
            max_steps=options.steps,
            accelerator=options.accelerator,
            devices=options.devices,
            # Clusters that are not learned get no gradient, for which plain DDP would wait.
            strategy="ddp_find_unused_parameters_true" if options.devices > 1 else "auto",
            precision=options.precision,
            logger=_logger(folder, options.log) if folder else False,
            callbacks=[_saver(folder, options.save_every)] if folder else [],
            plugins=[_StateFile()] if folder else [],
            enable_checkpointing=folder is not None,
            enable_progress_bar=progress,
            enable_model_summary=False,
            val_check_interval=options.validate_every if validation else None,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=50,
        )
        trainer.fit(
            module,
            DataLoader(Stream(patches), options.batch_size),
            DataLoader(validation, 1) if validation else None,
            ckpt_path=str(resume) if resume else None,
            weights_only=True if resume else None,
        )
    return module


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _StateFile(TorchCheckpointIO):
    """State in one file, the one before or the new one at every moment, wherever temporary files lie."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as part, part.open("wb") as file:  # by its path torch would keep the name in it
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *arguments, **options)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is no state that a run can go on with ({error}). Delete it, and the run starts again"
            ) from error


def _saver(folder: Path, every: int) -> pl.Callback:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder, filename="last", every_n_train_steps=every, enable_version_counter=False)


def _logger(folder: Path, kind: str) -> Any:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    return (TensorBoardLogger if kind == "tensorboard" else CSVLogger)(folder, name="", version="log")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes about hardware and workers to itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")  # of torch, in Lightning 2.6
        warnings.filterwarnings("ignore", message=".*exists and is not empty")  # the folder of a run that goes on
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def write_picture(path: Path, images: Sequence[np.ndarray]) -> None:
    """Write images ``(3, y, x)`` of one size side by side, stretched as the last one, as a PNG."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    rgb = np.concatenate(images, axis=-1)
    low, high = (np.percentile(images[-1], q, axis=(1, 2))[:, None, None] for q in (1, 99))
    pixels = (255 * np.clip((rgb - low) / np.maximum(high - low, 1e-6), 0, 1)).astype("uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", "PNG", pixels.shape[2], pixels.shape[1], 3, dtype="uint8") as file:
            file.write(pixels)


def adapt(
    ds: xr.Dataset,
    path: str | Path,
    *,
    weights: str | Path | Checkpoint = "default",
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    share: float = 1.0,
    options: PatchOptions | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Fine-tune weights on a cube at reduced scale, now, and store them as an ordinary checkpoint.

    Parameters
    ----------
    ds : Dataset
        Cube of the 10 m bands and those of the weights; read lazily, chunk by chunk, as `Patches` does.
    path : str or Path
        Safetensors file to write.
    weights : str, Path or Checkpoint
        Where to start from.
    steps, batch_size, learning_rate
        With patches of 48 pixels a step of the packaged ``ginet-s`` takes 0.4 s of two cores
        (``benchmarks/training.md``).
    share : float
        `FitOptions.share`. For ``mtf`` the whole has made every scene better, for ``box`` a quarter most scenes
        (``benchmarks/quality.md``).
    options : PatchOptions, optional
        Patches; without them resolution and degradation are those that the weights were trained for. A cube that was
        made by block means itself, as the paper's protocol has it, needs ``blur=0.45``.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Checkpoint
        To pass as ``weights=`` or by path.

    Raises
    ------
    ValueError
        If the cube has no patch without missing pixels, the loss is not finite, the weights are for other bands, or as
        `Patches` does.
    FileNotFoundError
        If the folder of ``path`` does not exist.
    """
    start = weights if isinstance(weights, Checkpoint) else load_checkpoint(weights)
    options = options or PatchOptions(
        resolution=cast(Literal[20, 60], 10 * start.config.factor), degradation=start.card.get("degradation", "mtf")
    )
    fitting = FitOptions(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        share=share,
        warm_up=20,
        averaging=0.98,
        accelerator="cpu",
    )
    path = expanded(path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(path).parent} to write the adapted weights to")
    fitted = fit(start.network(), Patches([ds], options), fitting, progress=progress)
    if not math.isfinite(fitted.losses[-1]):
        raise ValueError(
            f"the loss is {fitted.losses[-1]} after {steps} steps: nothing was written. Type a smaller learning_rate="
        )
    card = {
        "task": f"Sentinel-2 {options.resolution} m to 10 m",
        "degradation": options.degradation,
        "adapted_from": {"name": start.name, "sha256": start.sha256, "card": start.card},
        "adapted_on": np.atleast_1d(of_all(ds).get(ITEMS, [])).astype(str).tolist(),
        "steps": steps,
        "share": fitting.share,
        "blur": options.blur,
        "seed": options.seed,
        "loss": {"first": fitted.losses[0], "last": fitted.losses[-1]},
    }
    return save_checkpoint(path, fitted.result(), card)
