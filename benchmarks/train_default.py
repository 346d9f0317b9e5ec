"""Train the default checkpoint on real scenes at reduced scale (Wald's protocol).

    python benchmarks/train_default.py --scenes ../shared/data/scenes --minutes 110

Run again with the same arguments to go on after an interruption. The schedule follows the elapsed time, so the run
always ends with its learning rate annealed. The last line of the log tells where the averaged weights were written.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from evaluation import TEST, TRAIN, VALIDATION, Scene, predict, read_scene, wald_pair
from torch import Tensor

from xr_ginet.network import GINet, GINetConfig, load_checkpoint, save_checkpoint
from xr_ginet.sentinel2.bands import BANDS
from xr_ginet.training.degradation import box_mean, mtf_mean
from xr_ginet.training.fit import Fit
from xr_ginet.training.metrics import rmse
from xr_ginet.training.patches import Sample

PATCH = 48  # side of a training patch at the reduced fine resolution (20 m), in pixels
BATCH = 8
LEARNING_RATE = 7e-4
WARM_UP_STEPS = 300  # without it a run at twice this rate died at its start
GAIN_JITTER = 0.02  # of the blur's gain at the Nyquist frequency: what spread the scenes' own bands show
N_BLURS = 6  # blurred versions of each scene, the first without jitter


def reduced_versions(scene: Scene, degradation: str, rng: np.random.Generator) -> list[tuple[Tensor, ...]]:
    """Return ``(ms, hs, truth)`` at reduced scale for several slightly different blurs."""
    versions = []
    for blur in range(N_BLURS if degradation == "mtf" else 1):
        pair = []
        for image, bands in ((scene.fine, scene.fine_bands), (scene.coarse, scene.coarse_bands)):
            height, width = (n // 4 * 4 * image.shape[-1] // scene.coarse.shape[-1] for n in scene.coarse.shape[-2:])
            image = image[:, :height, :width]
            if degradation == "box":
                pair.append(box_mean(image, 2))
            else:
                jitter = rng.normal(0, GAIN_JITTER, len(bands)) * (blur > 0)
                pair.append(mtf_mean(image, 2, [BANDS[b].mtf_gain + j for b, j in zip(bands, jitter, strict=True)]))
        truth = scene.coarse[:, : pair[0].shape[-2], : pair[0].shape[-1]]
        versions.append(tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (*pair, truth)))
    return versions


class Sampler:
    """Random augmented patches from all scenes, each scene as often as the 0.7th power of its area."""

    def __init__(self, scenes: list[Scene], degradation: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.versions = [reduced_versions(scene, degradation, self.rng) for scene in scenes]
        area = np.array([v[0][2][0].numel() for v in self.versions], float) ** 0.7
        area *= [0.3 if scene.lossy else 1.0 for scene in scenes]
        self.share = area / area.sum()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        ms, hs, truth = zip(*(self.patch() for _ in range(BATCH)), strict=True)
        return torch.stack(ms), torch.stack(hs), torch.stack(truth)

    def patch(self) -> list[Tensor]:
        versions = self.versions[self.rng.choice(len(self.share), p=self.share)]
        ms, hs, truth = versions[self.rng.integers(len(versions))]
        y, x = (2 * self.rng.integers((n - PATCH) // 2 + 1) for n in truth.shape[-2:])
        crops = [
            ms[:, y : y + PATCH, x : x + PATCH],
            hs[:, y // 2 : (y + PATCH) // 2, x // 2 : (x + PATCH) // 2],
            truth[:, y : y + PATCH, x : x + PATCH],
        ]
        turns, flip = self.rng.integers(4), self.rng.integers(2)
        crops = [torch.rot90(c.flip(-1) if flip else c, int(turns), (-2, -1)) for c in crops]
        gain = math.exp(self.rng.normal(0, 0.25))
        fine_gain = torch.tensor(gain * np.exp(self.rng.normal(0, 0.08, len(ms))), dtype=torch.float32)
        coarse_gain = torch.tensor(gain * np.exp(self.rng.normal(0, 0.08, len(hs))), dtype=torch.float32)
        return [c * g[:, None, None] for c, g in zip(crops, (fine_gain, coarse_gain, coarse_gain), strict=True)]


def initialise(network: GINet) -> None:
    """Start near bicubic upsampling, with errors scaled up to the size of activations and a guide that is alive."""
    bilinear = torch.tensor([0.5, 1.0, 0.5])
    with torch.no_grad():
        for stage in network.stages:
            stage.up.spread[0].weight.copy_(bilinear[:, None] * bilinear)
            stage.correction.error_features.weight *= 5
            stage.correction.error_keys.weight *= 5
            stage.correction.reconstruct.weight *= 0.1
        network.guide.output.bias += 0.2


def validate(network: GINet, scenes: list[Scene], degradation: str) -> dict[str, float]:
    scores = {}
    for scene in scenes:
        ms, hs, truth = wald_pair(scene, degradation)
        scores[scene.name] = float(np.sqrt((rmse(predict(network, ms, hs), truth, border=8) ** 2).mean()) * 1e4)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/ginet-s"))
    parser.add_argument("--degradation", choices=("mtf", "box"), default="mtf")
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--features", type=int, default=22)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--cluster-features", type=int, nargs=2, default=(32, 64))
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", help="weights to start from, by name or path, instead of features and stages")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        network = load_checkpoint(args.start).network()
    else:
        network = GINet(
            GINetConfig(
                n_features=args.features,
                n_stages=args.stages,
                assignment="soft",
                window_size=args.window,
                n_blocks=args.blocks,
                cluster_features=tuple(args.cluster_features),
            )
        )
        initialise(network)
    fit = Fit(network, learning_rate=args.learning_rate, averaging=0.999)
    average = fit.average
    step, elapsed = 0, 0.0
    state_path = args.out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["degradation"] != args.degradation:
            parser.error(f"{state_path} is of a run for {state['degradation']}: name another --out")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        fit.optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
    sampler = Sampler([read_scene(args.scenes, n) for n in TRAIN], args.degradation, args.seed + step)
    validation = [read_scene(args.scenes, n) for n in VALIDATION]

    start, budget = time.monotonic() - elapsed, args.minutes * 60
    running: list[float] = []
    while (elapsed := time.monotonic() - start) < budget:
        rate = min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * elapsed / budget)) + 0.005)
        running.append(fit.step(Sample(*sampler.batch()), rate=rate))
        step += 1
        if step % 50 == 0:
            print(f"step {step} {elapsed:.0f} s loss {np.mean(running):.4f}", flush=True)
            running.clear()
        if step % 400 == 0:
            print(json.dumps(validate(fit.averaged, validation, args.degradation)), flush=True)
            state = {
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizer": fit.optimizer.state_dict(),
                "step": step,
                "elapsed": elapsed,
                "degradation": args.degradation,
            }
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)  # never half a file
    card = {
        "task": "Sentinel-2 20 m to 10 m",
        "degradation": args.degradation,
        "gain_jitter": GAIN_JITTER if args.degradation == "mtf" else 0.0,
        "data": {"train": list(TRAIN), "validation": list(VALIDATION), "kept out": list(TEST)},
        "rmse_validation": validate(fit.averaged, validation, args.degradation),
        "seed": args.seed,
        "steps": step,
        "minutes": args.minutes,
        "command": f"python benchmarks/train_default.py --degradation {args.degradation} --minutes {args.minutes:g} "
        + (f"--start {args.start}" if args.start else f"--features {args.features} --stages {args.stages}")
        + f" --threads {args.threads} --seed {args.seed}",
    }
    written = save_checkpoint(args.out / "weights.safetensors", fit.averaged, card)
    print(written.path, json.dumps(card["rmse_validation"]))


if __name__ == "__main__":
    main()
