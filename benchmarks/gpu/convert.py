"""Turn a state of train.py into a checkpoint with its model card.

python benchmarks/gpu/convert.py --state build/gpu/ginet.pt --out xr_ginet/weights/ginet.safetensors
"""

import argparse
import sys
from pathlib import Path

import torch

from xr_ginet.network import GINet, GINetConfig, load_checkpoint, save_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluation import TEST, TRAIN, VALIDATION


def convert(path: Path, out: Path, start: Path | None = None) -> None:
    """Write the averaged weights of a state, which started from those of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = GINet(GINetConfig(**state["config"]))
    network.load_state_dict(state["average"])
    card = {
        "task": "Sentinel-2 20 m to 10 m",
        "degradation": state["degradation"],
        "gain_jitter": 0.02 if state["degradation"] == "mtf" else 0.0,
        "fine_gain": [0.25, 0.45] if state["degradation"] == "mtf" else None,
        "data": {"train": list(TRAIN), "validation": list(VALIDATION), "kept out": list(TEST)},
        "rmse_validation": state["rmse"],
        "start": state["start"],
        **({"started from": load_checkpoint(start).card} if start else {}),
        "seed": 0,
        "steps": state["step"],
        "minutes": state["elapsed"] / 60,
        "device": state["device"],
        "command": state["command"],
    }
    print(save_checkpoint(out, network, card).path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint that training started from: its card goes along")
    options = parser.parse_args()
    convert(options.state, options.out, options.start)
