"""Write the training and validation scenes, as uint16 digital numbers, to one file of at most 50 MiB.

python benchmarks/gpu/pack.py --scenes ../shared/data/scenes --out build/gpu/data.npz
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluation import LOSSY, TRAIN, VALIDATION

LIMIT = 50 * 2**20


def pack(scenes: Path, out: Path, train: tuple[str, ...] = TRAIN, validation: tuple[str, ...] = VALIDATION) -> None:
    """Write ``NAME/b10`` and ``NAME/b20`` of each scene, and the names: ``train``, ``validation``, ``lossy``."""
    arrays = {"train": np.array(train), "validation": np.array(validation), "lossy": np.array(LOSSY)}
    for name in (*train, *validation):
        with np.load(scenes / f"{name}.npz") as file:
            arrays |= {f"{name}/{key}": file[key].astype("uint16") for key in ("b10", "b20")}
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    if (size := out.stat().st_size) > LIMIT:
        raise ValueError(f"{out} has {size} bytes; at most {LIMIT} travel. Leave scenes out")
    print(f"{out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, default=Path("../shared/data/scenes"))
    parser.add_argument("--out", type=Path, default=Path("build/gpu/data.npz"))
    options = parser.parse_args()
    pack(options.scenes, options.out)
