"""Offline weight surgery: checkpoints, architectures, heads. Knows nothing of training or of the command line."""

from .architectures import ARCHITECTURES, find_architecture
from .checkpoint import Checkpoint, open_checkpoint
from .errors import KvConvertError
from .execute import execute
from .gqa import Gqa
from .heads import HeadGrouping
from .inspection import inspect_checkpoint
from .plan import ConversionPlan

__all__ = [
    "ARCHITECTURES",
    "Checkpoint",
    "ConversionPlan",
    "Gqa",
    "HeadGrouping",
    "KvConvertError",
    "execute",
    "find_architecture",
    "inspect_checkpoint",
    "open_checkpoint",
]
