"""Train the paper's configuration on one GPU, in resumable pieces; needs torch and numpy, and nothing installed.

python benchmarks/gpu/train.py --data build/gpu/data.npz --state build/gpu/ginet.pt --minutes 9 --total-minutes 27

Run again to go on. The learning rate follows the time trained so far. Prints one JSON object a line.
"""

import argparse
import dataclasses
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # bare folders instead of packages, whose __init__ files import what is not installed there
    for name in ("xr_ginet", "xr_ginet.network", "xr_ginet.sentinel2", "xr_ginet.training"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT / name.replace(".", "/"))]
from xr_ginet.network.ginet import GINet, GINetConfig  # noqa: E402
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M  # noqa: E402
from xr_ginet.training.objective import relative_error, start_near_bicubic  # noqa: E402

N_BLURS = 6  # blurred versions of each scene, drawn anew for each piece; the first is without jitter
GAIN_JITTER = 0.02
BORDER = 8
WARM_UP_STEPS = 300
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
        self.rng, self.degradation = rng, degradation
        with np.load(path) as file:
            names = {key: file[key].tolist() for key in ("train", "validation", "lossy")}
            scenes = {n: self._scene(file, n, device) for n in names["train"] + names["validation"]}
        n_blurs = N_BLURS if degradation == "mtf" else 1
        self.train = [
            [wald(*scenes[n], degradation, rng.normal(0, GAIN_JITTER, 10) * (blur > 0)) for blur in range(n_blurs)]
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

    def batch(self, n: int, size: int) -> Pair:
        return tuple(torch.stack(images) for images in zip(*(self._patch(size) for _ in range(n)), strict=True))

    def _patch(self, size: int) -> list[Tensor]:
        versions = self.train[self.rng.choice(len(self.share), p=self.share)]
        ms, hs, truth = versions[self.rng.integers(len(versions))]
        y, x = (2 * int(self.rng.integers((n - size) // 2 + 1)) for n in truth.shape[-2:])
        windows = ((ms, 1), (hs, 2), (truth, 1))
        crops = [i[:, y // f : (y + size) // f, x // f : (x + size) // f] for i, f in windows]
        turns, mirror = int(self.rng.integers(4)), self.rng.integers(2)
        gains = np.exp(self.rng.normal(0, 0.25) + self.rng.normal(0, 0.08, 10)).astype("float32")
        gains = torch.from_numpy(gains)[:, None, None].to(truth.device, non_blocking=True)
        crops = [torch.rot90(c.flip(-1) if mirror else c, turns, (-2, -1)) for c in crops]
        return [c * g for c, g in zip(crops, (gains[:4], gains[4:], gains[4:]), strict=True)]

    def rmse(self, network: GINet) -> dict[str, float]:
        """Return the error of each validation scene in digital numbers."""
        scores = {}
        for name, (ms, hs, truth) in self.validation.items():
            with torch.inference_mode():
                error = network(ms[None], hs[None])[0] - truth
            scores[name] = 1e4 * float((error[:, BORDER:-BORDER, BORDER:-BORDER] ** 2).mean().sqrt())
        return scores


def attend_in_float32(network: GINet, device: str) -> None:
    """Keep the attention out of autocast."""
    for stage in network.stages:

        def forward(*inputs: Tensor, plain=stage.correction.attention.forward) -> Tensor:
            with torch.autocast(device, enabled=False):
                return plain(*(i.float() for i in inputs))

        stage.correction.attention.forward = forward


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
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = GINet(GINetConfig(n_features=args.features, n_stages=args.stages, assignment="soft"))
    start_near_bicubic(network)
    network.to(device, memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    attend_in_float32(network, device)
    optimizer = torch.optim.AdamW(network.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    rng, step, before = np.random.default_rng(0), 0, 0.0
    if args.state.exists():
        state = torch.load(args.state, map_location=device, weights_only=True)
        if state["degradation"] != args.degradation:
            parser.error(f"{args.state} is of a run for {state['degradation']}: name another --state")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = json.loads(state["rng"])
        step, before = state["step"], state["elapsed"]
    data = Data(args.data, args.degradation, device, rng)
    forward = torch.compile(network) if args.compile else network
    start, log = time.monotonic(), time.monotonic()
    total = 60 * args.total_minutes
    while (piece := time.monotonic() - start) < 60 * args.minutes and before + piece < total:
        rate = min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * (before + piece) / total)) + 0.005)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        ms, hs, truth = data.batch(args.batch, args.size)
        with torch.autocast(device, torch.bfloat16):
            estimate = forward(ms.to(memory_format=torch.channels_last), hs)
        loss = relative_error(estimate.float(), truth, hs)
        optimizer.zero_grad()
        loss.backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)):
            optimizer.step()
            average.update_parameters(network)
        step += 1
        if time.monotonic() - log > 60:
            log = time.monotonic()
            print(json.dumps({"step": step, "loss": loss.item(), "rmse": data.rmse(average.module)}), flush=True)
    scores, elapsed = data.rmse(average.module), before + time.monotonic() - start
    state = {
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": json.dumps(rng.bit_generator.state),
        "config": dataclasses.asdict(network.config),
        "rmse": scores,
        "step": step,
        "elapsed": elapsed,
        "degradation": args.degradation,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    out = args.out or args.state
    torch.save(state, out.with_suffix(".tmp"))
    out.with_suffix(".tmp").replace(out)  # never half a file
    print(json.dumps({"step": step, "elapsed": elapsed, "rmse": scores}), flush=True)


if __name__ == "__main__":
    main()
