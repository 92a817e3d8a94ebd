"""Offline weight surgery: checkpoints, architectures, heads. Knows nothing of training or of the command line."""

from .architectures import ARCHITECTURES, find_architecture
from .checkpoint import Checkpoint, open_checkpoint
from .cla import Cla
from .errors import KvConvertError
from .execute import execute
from .gqa import Gqa
from .heads import HeadGrouping
from .inspection import inspect_checkpoint
from .layers import LayerGrouping
from .mla import Mla
from .plan import ConversionPlan
from .runtime import register
from .translations import ROUTES, as_cross_layer, as_latent_source, as_target

__all__ = [
    "ARCHITECTURES",
    "ROUTES",
    "Checkpoint",
    "Cla",
    "ConversionPlan",
    "Gqa",
    "HeadGrouping",
    "KvConvertError",
    "LayerGrouping",
    "Mla",
    "as_cross_layer",
    "as_latent_source",
    "as_target",
    "execute",
    "find_architecture",
    "inspect_checkpoint",
    "open_checkpoint",
]

register()
