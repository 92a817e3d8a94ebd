"""The record of what commands write and print: equal code gives an equal one, and a change does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import freeze
from kvconvert.convert import plan
from kvconvert.convert.algebra import heads

CASES = tuple(case for case in freeze.OF_EVERY_ROW if case.name in ("inspect", "gqa-mean"))
ROW = next(row for row in freeze.rows() if row.name == "native-llama")


def test_a_deliberate_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = freeze.run_row(ROW, CASES)
    frozen = {name: record.as_json() for name, record in before.items()}
    assert len(frozen["native-llama/gqa-mean"]["files"]) > 5
    assert freeze.differences(frozen, freeze.run_row(ROW, CASES)) == []

    def nearly_mean(projection: torch.Tensor, grouping: heads.HeadGrouping) -> torch.Tensor:
        return heads.mean_heads(projection, grouping) * (1 + 2**-20)

    monkeypatch.setattr(plan, "POOLING_METHODS", {**heads.POOLING_METHODS, "mean": nearly_mean})
    found = freeze.differences(frozen, freeze.run_row(ROW, CASES))
    assert [line.partition(" was ")[0] for line in found] == [
        f"native-llama/gqa-mean: out/gqa-mean/{name}" for name in ("kvconvert.json", "model.safetensors")
    ]  # the manifest has the digest of the weights
