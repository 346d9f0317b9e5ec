"""Kills at every write of every operation: readers find whole dates only, and the same call completes the job."""

from __future__ import annotations

from pathlib import Path

import kills
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:Object at")

KINDS = list(kills.places(Path()))
CASES = [
    pytest.param(operation, kind, id=f"{operation.name}-{kind}")
    for operation in (*kills.OPERATIONS, *kills.BESIDE)
    for kind in KINDS
    if kills.possible(operation, kind)
]


@pytest.mark.slow  # a thousand jobs
@pytest.mark.parametrize(("operation", "kind"), CASES)
def test_a_job_killed_at_any_change_of_its_store(operation: kills.Operation, kind: str, tmp_path: Path) -> None:
    found = kills.killed_at_every_change(operation, kills.places(tmp_path)[kind])
    assert found.moments > 2
    assert not found.faults, found.first


@pytest.mark.parametrize(
    ("operation", "kind"),
    [case for i, case in enumerate(CASES) if i % 3 == 0],
)
def test_a_job_killed_at_some_changes_of_its_store(operation: kills.Operation, kind: str, tmp_path: Path) -> None:
    found = kills.killed_at_every_change(operation, kills.places(tmp_path)[kind], step=9, offset=2)
    assert not found.faults, found.first
