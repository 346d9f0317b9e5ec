"""Training runs from TOML files, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import three_grids
from test_fit import simulated_cube
from typer.testing import CliRunner

from xr_ginet.cli import app
from xr_ginet.network import load_checkpoint
from xr_ginet.training.patches import Patches, PatchOptions
from xr_ginet.training.run import Run, new_network, open_cubes, train

RUN = """
name = "tiny"

[network]
n_features = 4
n_stages = 1
cluster_features = [4, 4]

[patches]
size = 16

[fit]
steps = 3
batch_size = 2
accelerator = "cpu"
validate_every = 2

[[train]]
path = "cube.zarr"
repeat = 2

[[validation]]
path = "cube.zarr"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    simulated_cube(64).ginet.to_zarr(tmp_path / "cube.zarr")
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def test_a_run_file_becomes_weights_with_a_card_and_runs_on_where_it_stopped(folder: Path) -> None:
    command = ["train", "--config", str(folder / "run.toml"), "--folder", str(folder / "out"), "--quiet"]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    checkpoint = load_checkpoint(folder / "out" / "tiny.safetensors")
    assert (checkpoint.config.n_features, checkpoint.config.assignment) == (4, "soft")
    assert checkpoint.card["data"] == {"train": ["cube"], "validation": ["cube"]}
    assert checkpoint.card["degradation"] == "mtf"
    assert checkpoint.card["rmse_validation"] > 0
    assert checkpoint.card["run"]["fit"]["steps"] == 3
    assert checkpoint.card["command"].startswith("xr-ginet train --config")
    assert str(folder) not in str(checkpoint.card["data"])
    sha256 = checkpoint.sha256
    (folder / "out" / "tiny.safetensors").unlink()
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert load_checkpoint(folder / "out" / "tiny.safetensors").sha256 == sha256


def test_a_run_may_start_from_weights(folder: Path) -> None:
    (folder / "run.toml").write_text(
        'name = "x"\nstart = "ginet-s"\n[patches]\nsize = 16\n[[train]]\npath = "cube.zarr"\n'
    )
    run = Run.from_toml(folder / "run.toml")
    network = new_network(run, Patches(open_cubes(run.train), run.patches))
    weights = load_checkpoint("ginet-s").network().state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_a_new_network_depends_on_its_seed_and_starts_from_k_means(folder: Path) -> None:
    run = Run.from_toml(folder / "run.toml")
    patches = Patches(open_cubes(run.train), PatchOptions(size=16))
    assert len(patches.cubes) == 2
    one, same = (new_network(run, patches).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert torch.equal(one["guide.classify.0.weight"][range(4), range(4), 1, 1], torch.ones(4))
    assert set(patches.state_dict().values()) == {0}


def test_a_run_of_the_60_m_bands_makes_a_network_for_them(tmp_path: Path) -> None:
    three_grids((24, 24)).chunk().ginet.to_zarr(tmp_path / "cube.zarr")
    text = RUN.replace("size = 16", "size = 12\nresolution = 60")
    (tmp_path / "run.toml").write_text(text)
    checkpoint = train(Run.from_toml(tmp_path / "run.toml"), tmp_path / "out")
    assert (checkpoint.config.bands, checkpoint.config.factor) == (("B01", "B09"), 6)
    assert checkpoint.card["task"] == "Sentinel-2 60 m to 10 m"
    assert (tmp_path / "out" / "pictures" / "step_000002.png").exists()
    (tmp_path / "run.toml").write_text(text.replace("n_stages", "factor = 3\nn_stages"))
    with pytest.raises(ValueError, match="for B01, B09 and factor 3; patches are of B01, B09 and factor 6"):
        train(Run.from_toml(tmp_path / "run.toml"), tmp_path / "again")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("name =", "name ", "is no TOML"),
        ("size = 16", "sise = 16", r"\[patches\] has sise; the keys are .*size"),
        ("n_stages = 1", "n_stages = 0", "n_stages=0: must be an integer of at least 1"),
        ('name = "tiny"', 'name = "tiny"\nstart = "ginet-s"', "has start, whose network is what it is"),
        ('name = "tiny"', "", "missing 1 required positional argument: 'name'"),
        ('path = "cube.zarr"\nrepeat', "repeat", r"\[\[train\]\] .*path= of a Zarr cube or catalog= of a STAC API"),
        ("steps = 3", "steps = 0", "steps=0: must be at least 1"),
    ],
)
def test_a_run_file_that_is_wrong_says_where(folder: Path, old: str, new: str, match: str) -> None:
    (folder / "run.toml").write_text(RUN.replace(old, new, 1))
    with pytest.raises(ValueError, match=match):
        Run.from_toml(folder / "run.toml")


def test_a_run_without_cubes_is_refused(folder: Path) -> None:
    (folder / "run.toml").write_text('name = "x"\n')
    with pytest.raises(ValueError, match=r"names no cube to learn from: add \[\[train\]\]"):
        Run.from_toml(folder / "run.toml")


def test_the_command_shows_an_error_without_a_traceback(folder: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--config", str(folder / "no.toml"), "--folder", str(folder)])
    assert result.exit_code == 1
    assert "no.toml" in result.output
    assert "Traceback" not in result.output
