"""Offline weight surgery: checkpoints, architectures, heads. Knows nothing of training or of the command line."""

from .architectures import ARCHITECTURES, find_architecture
from .checkpoint import Checkpoint, open_checkpoint
from .errors import KvConvertError
from .execute import execute
from .gqa import Gqa
from .heads import HeadGrouping
from .inspection import inspect_checkpoint
from .plan import ConversionPlan
from .translations import TRANSLATIONS, as_native

__all__ = [
    "ARCHITECTURES",
    "TRANSLATIONS",
    "Checkpoint",
    "ConversionPlan",
    "Gqa",
    "HeadGrouping",
    "KvConvertError",
    "as_native",
    "execute",
    "find_architecture",
    "inspect_checkpoint",
    "open_checkpoint",
]
