"""Train the paper's configuration on one GPU, in resumable pieces; needs torch and numpy, and nothing installed.

python benchmarks/gpu/train.py --data build/gpu/data.npz --state build/gpu/ginet.pt --minutes 9 --total-minutes 27

Run again to go on. The learning rate follows the time trained so far. Prints one JSON object a line. On a GPU a step is
one CUDA graph: otherwise the launches of attention's many small kernels would take longer than the kernels.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # bare folders instead of packages, whose __init__ files import what is not installed there
    for name in ("xr_ginet", "xr_ginet.network", "xr_ginet.sentinel2", "xr_ginet.training"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT / name.replace(".", "/"))]
from xr_ginet.network.ginet import GINet, GINetConfig  # noqa: E402
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M  # noqa: E402
from xr_ginet.training.objective import relative_error, start_near_bicubic  # noqa: E402

N_BLURS = 12  # blurred versions of each scene, drawn anew for each piece; the first is without jitter
GAIN_JITTER = 0.02
FINE_GAIN = 0.25, 0.45  # of the 10 m bands, whose true sharpness is not known
BORDER = 8
WARM_UP_STEPS = 300
AVERAGING = 0.999
Pair = tuple[Tensor, Tensor, Tensor]


def degrade(image: Tensor, gains: list[float] | None) -> Tensor:
    """Return ``(band, y, x)`` at half the resolution, as training.degradation does; box means without gains."""
    if gains is None:
        return F.avg_pool2d(image, 2)
    sigma = 2 * (-2 * torch.tensor(gains, dtype=torch.float64).log()).sqrt() / math.pi
    taps = torch.exp(-0.5 * ((torch.arange(12) - 5.5) / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).to(image)[:, None]  # (band, 1, 12)
    before = [image[:, :5].flip(1), image, image[:, -5:].flip(1)]  # borders are mirrored, edge pixel included
    rows = torch.cat(before, 1)
    padded = torch.cat([rows[..., :5].flip(-1), rows, rows[..., -5:].flip(-1)], -1)
    down = F.conv2d(padded[None], taps[..., None], stride=(2, 1), groups=len(gains))
    return F.conv2d(down, taps[:, :, None], stride=(1, 2), groups=len(gains))[0]


def wald(fine: Tensor, coarse: Tensor, degradation: str, jitter: np.ndarray) -> Pair:
    """Return ``(ms, hs, truth)`` with the bands' gains moved by ``jitter (10,)``."""
    gains = [float(BANDS[b].mtf_gain + j) for b, j in zip(BANDS_10M + BANDS_20M, jitter, strict=True)]
    split = (None, None) if degradation == "box" else (gains[:4], gains[4:])
    return degrade(fine, split[0]), degrade(coarse, split[1]), coarse


class Data:
    """The packed scenes on the device: augmented training batches, validation images."""

    def __init__(self, path: Path, degradation: str, device: str, rng: np.random.Generator) -> None:
        self.rng, self.degradation, self.device = rng, degradation, device
        with np.load(path) as file:
            names = {key: file[key].tolist() for key in ("train", "validation", "lossy")}
            scenes = {n: self._scene(file, n, device) for n in names["train"] + names["validation"]}
        n_blurs = N_BLURS if degradation == "mtf" else 1
        self.train = [
            [wald(*scenes[n], degradation, self._jitter() * (blur > 0)) for blur in range(n_blurs)]
            for n in names["train"]
        ]
        share = [scenes[n][1][0].numel() ** 0.7 * (0.3 if n in names["lossy"] else 1) for n in names["train"]]
        self.share = np.array(share) / sum(share)
        self.validation = {n: wald(*scenes[n], degradation, np.zeros(10)) for n in names["validation"]}

    @staticmethod
    def _scene(file: np.lib.npyio.NpzFile, name: str, device: str) -> tuple[Tensor, Tensor]:
        fine, coarse = (torch.from_numpy(file[f"{name}/{k}"].astype("float32") / 10_000) for k in ("b10", "b20"))
        y, x = (n // 8 * 8 for n in coarse.shape[-2:])
        return fine[:, : 2 * y, : 2 * x].to(device), coarse[:, :y, :x].to(device)

    def _jitter(self) -> np.ndarray:
        jitter = self.rng.normal(0, GAIN_JITTER, 10)
        jitter[:4] += self.rng.uniform(*FINE_GAIN) - BANDS["B02"].mtf_gain
        return jitter

    def batch(self, n: int, size: int) -> Pair:
        gains = np.exp(self.rng.normal(0, 0.25, (n, 1)) + self.rng.normal(0, 0.08, (n, 10))).astype("float32")
        gains = torch.from_numpy(gains)[..., None, None]
        if self.device == "cuda":
            gains = gains.pin_memory().to(self.device, non_blocking=True)
        ms, hs, truth = (torch.stack(images) for images in zip(*(self._patch(size) for _ in range(n)), strict=True))
        return ms * gains[:, :4], hs * gains[:, 4:], truth * gains[:, 4:]

    def _patch(self, size: int) -> list[Tensor]:
        versions = self.train[self.rng.choice(len(self.share), p=self.share)]
        ms, hs, truth = versions[self.rng.integers(len(versions))]
        y, x = (2 * int(self.rng.integers((n - size) // 2 + 1)) for n in truth.shape[-2:])
        windows = ((ms, 1), (hs, 2), (truth, 1))
        crops = [i[:, y // f : (y + size) // f, x // f : (x + size) // f] for i, f in windows]
        turns, mirror = int(self.rng.integers(4)), self.rng.integers(2)
        return [torch.rot90(c.flip(-1) if mirror else c, turns, (-2, -1)) for c in crops]

    def rmse(self, network: GINet) -> dict[str, float]:
        """Return the error of each validation scene in digital numbers."""
        scores = {}
        for name, (ms, hs, truth) in self.validation.items():
            with torch.inference_mode():
                error = network(ms[None], hs[None])[0] - truth
            scores[name] = 1e4 * float((error[:, BORDER:-BORDER, BORDER:-BORDER] ** 2).mean().sqrt())
        return scores


def weights(path: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a state, or those of a checkpoint."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)["average"]


def attend_in_float32(network: GINet, device: str) -> None:
    """Keep the attention out of autocast."""
    for stage in network.stages:

        def forward(*inputs: Tensor, plain=stage.correction.attention.forward) -> Tensor:
            with torch.autocast(device, enabled=False):
                return plain(*(i.float() for i in inputs))

        stage.correction.attention.forward = forward


def pad_channels(network: GINet) -> None:
    """Let the residual blocks work on a multiple of 16 channels, with zeros behind theirs, as matrix units want it."""

    def convolve(layer: torch.nn.Conv2d, x: Tensor, missing: int) -> Tensor:
        return F.conv2d(
            x, F.pad(layer.weight, (0, 0, 0, 0, 0, missing, 0, missing)), F.pad(layer.bias, (0, missing)), padding=1
        )

    for stage in network.stages:
        blocks = stage.correction.blocks

        def forward(x: Tensor, blocks=blocks) -> Tensor:
            width = x.shape[1]
            missing = -width % 16
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
            for block in blocks:
                x = (convolve(block.conv_b, convolve(block.conv_a, x, missing).relu_(), missing) + x).relu_()
            return x[:, :width]

        blocks.forward = forward


class Training:
    """A network, the average of its weights, and the step that improves both."""

    def __init__(self, config: GINetConfig, learning_rate: float, device: str) -> None:
        self.device = device
        network = GINet(config)
        start_near_bicubic(network)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.sum = [torch.zeros_like(weight) for weight in network.parameters()]
        """Exponential average of the weights, starting from nothing."""
        self.updates = 0
        """How many weights are in it."""
        self.average = GINet(config).to(device).requires_grad_(False)
        attend_in_float32(network, device)
        pad_channels(network)
        self.rate = torch.tensor(learning_rate, device=device)
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            self.rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            capturable=device == "cuda",
            fused=True,
        )
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, batch: Pair) -> Tensor:
        """Take a step, and return its loss before it."""
        if self.device != "cuda":
            return self._step(batch)
        if self.graph is None:
            self._capture(batch)
        for own, new in zip(self.batch, batch, strict=True):
            own.copy_(new)
        self.graph.replay()
        self.updates += 1
        return self.loss

    def _capture(self, batch: Pair) -> None:
        self.batch = [image.clone() for image in batch]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(self.batch)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._step(self.batch)
        self.updates -= 1  # that one was only recorded

    def _step(self, batch: Pair) -> Tensor:
        ms, hs, truth = batch
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            estimate = self.network(ms, hs)
        loss = relative_error(estimate.float(), truth, hs)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        parameters = list(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # a fused step is then left out, on the device
        self.optimizer.step()
        torch._foreach_lerp_(self.sum, parameters, 1 - AVERAGING)
        self.updates += 1
        return loss.detach()

    def averaged(self) -> GINet:
        """Return the network of the averaged weights."""
        share = 1 - AVERAGING**self.updates  # the rest is of the nothing that it started from
        with torch.no_grad():
            for average, total in zip(self.average.parameters(), self.sum, strict=True):
                average.copy_(total / share)
        return self.average


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="read where it exists, written at the end")
    parser.add_argument("--out", type=Path, help="where to write the state instead")
    parser.add_argument("--degradation", choices=("mtf", "box"), default="mtf")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--total-minutes", type=float, default=27)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--log", type=float, default=30, help="seconds between lines")
    parser.add_argument("--start", type=Path, help="another state, or a checkpoint, to start with its weights")
    parser.add_argument("--last", action="store_true", help="write the averaged weights alone: a quarter of the bytes")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = GINetConfig(n_features=args.features, n_stages=args.stages, assignment="soft")
    training = Training(config, args.learning_rate, device)
    rng, step, before, origin = np.random.default_rng(0), 0, 0.0, None
    if args.state.exists():
        state = torch.load(args.state, map_location=device, weights_only=True)
        if state["degradation"] != args.degradation:
            parser.error(f"{args.state} is of a run for {state['degradation']}: name another --state")
        if "network" not in state:
            parser.error(f"{args.state} was written with --last: there is no going on from it, only --start")
        training.network.load_state_dict(state["network"])
        torch._foreach_copy_(training.sum, state["sum"])
        training.updates = state["updates"]
        training.optimizer.load_state_dict(state["optimizer"])
        training.optimizer.param_groups[0]["lr"] = training.rate
        rng.bit_generator.state = json.loads(state["rng"])
        step, before, origin = state["step"], state["elapsed"], state["start"]
    elif args.start:
        training.network.load_state_dict(weights(args.start))
        origin = f"{args.start.name}, sha256 {hashlib.sha256(args.start.read_bytes()).hexdigest()[:12]}"
    data = Data(args.data, args.degradation, device, rng)
    start, log = time.monotonic(), time.monotonic()
    total = 60 * args.total_minutes
    while (piece := time.monotonic() - start) < 60 * args.minutes and before + piece < total:
        rate = min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * (before + piece) / total)) + 0.005)
        training.rate.fill_(args.learning_rate * rate)
        loss = training.step(data.batch(args.batch, args.size))
        step += 1
        if step % 8 == 0:
            loss.item()  # the clock is the device's, not that of a queue ahead of it
        if time.monotonic() - log > args.log:
            log = time.monotonic()
            print(json.dumps({"step": step, "loss": loss.item(), "rmse": data.rmse(training.averaged())}), flush=True)
    scores, elapsed = data.rmse(training.averaged()), before + time.monotonic() - start
    state = {
        "average": training.averaged().state_dict(),
        "config": dataclasses.asdict(config),
        "rmse": scores,
        "step": step,
        "elapsed": elapsed,
        "degradation": args.degradation,
        "start": origin,
        "command": "python benchmarks/gpu/train.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    if not args.last:
        state |= {"network": training.network.state_dict(), "optimizer": training.optimizer.state_dict()}
        state |= {"sum": training.sum, "updates": training.updates, "rng": json.dumps(rng.bit_generator.state)}
    out = args.out or args.state
    torch.save(state, out.with_suffix(".tmp"))
    out.with_suffix(".tmp").replace(out)  # never half a file
    print(json.dumps({"step": step, "elapsed": elapsed, "rmse": scores}), flush=True)


if __name__ == "__main__":
    main()
