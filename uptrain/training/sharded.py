"""Checkpoints of a model that FSDP2 has sharded: each process writes and reads its own part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["SHARDS_NAME", "load_sharded", "save_sharded"]

SHARDS_NAME = "shards"


def save_sharded(model: Any, optimizer: Any, folder: Path) -> None:
    """Save weights and optimizer state of a sharded model. All processes have to call it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(folder / SHARDS_NAME))


def load_sharded(model: Any, optimizer: Any, folder: Path) -> None:
    """Load what `save_sharded` saved, with any number of processes. All of them have to call it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    load(state, checkpoint_id=str(folder / SHARDS_NAME))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
