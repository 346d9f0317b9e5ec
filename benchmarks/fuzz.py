"""The targets of tests/test_fuzz.py for as long as one likes, led by which lines of the package an input reaches.

    pip install atheris
    python benchmarks/fuzz.py item -runs=100000        # or job, run, checkpoint

An input that ends in anything but a result or a named error stops it, and is kept in a file ``crash-…``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with atheris.instrument_imports(include=["xr_ginet"]):
    import test_fuzz

    from xr_ginet.jobs import Job
    from xr_ginet.network import GINet, GINetConfig, save_checkpoint
    from xr_ginet.training.run import Run


def main() -> None:
    kind, *options = sys.argv[1:]
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = save_checkpoint(folder / "small.safetensors", GINet(GINetConfig(n_stages=1, n_features=2))).path
        targets = {
            "item": test_fuzz.read_or_refuse_an_item,
            "job": partial(test_fuzz.read_or_refuse_a_file, Job, test_fuzz.JOB, folder),
            "run": partial(test_fuzz.read_or_refuse_a_file, Run, test_fuzz.RUN, folder),
            "checkpoint": partial(test_fuzz.read_or_refuse_a_checkpoint, path, folder),
        }
        target = targets[kind]

        @settings(database=None, deadline=None)
        @given(st.data())
        def once(data: st.DataObject) -> None:
            target(data)

        long = ["-max_len=4000", "-len_control=0"]  # of short inputs nothing can be drawn
        atheris.Setup([sys.argv[0], *long, *options], once.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
