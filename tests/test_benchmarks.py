"""A tiny run of each benchmark, so that they do not rot."""

from __future__ import annotations

from pathlib import Path

import attention
import pytest
import quality
import train_default
from conftest import SHARED, needs_shared

from xr_ginet.network import load_checkpoint


def test_attention_benchmark_writes_its_table(tmp_path: Path) -> None:
    attention.main(["--size", "48", "--runs", "1", "--out", str(tmp_path / "results.md")])
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["attention", "compact network"]


@needs_shared
@pytest.mark.slow
def test_quality_benchmark_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--scenes", str(SHARED), "--out", str(tmp_path / "quality.md")])
    quality.main()
    assert "| ucnn_vietnam | test | 272.3 |" in (tmp_path / "quality.md").read_text()


@needs_shared
def test_training_script_writes_a_checkpoint_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_default, "TRAIN", ("ben_T33UUP_20170613_87_48",))
    monkeypatch.setattr(train_default, "VALIDATION", ("ben_T35VPK_20170924_41_29",))
    command = ["train", "--scenes", str(SHARED / "scenes"), "--out", str(tmp_path), "--features", "6", "--stages", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--minutes", "0.05", "--threads", "1"])
    train_default.main()
    card = load_checkpoint(tmp_path / "weights.safetensors").card
    assert card["degradation"] == "mtf"
    assert card["steps"] > 3
