"""Offline weight surgery: checkpoints, architectures, heads. Knows nothing of training or of the command line."""

from .algebra.heads import HeadGrouping
from .algebra.layer_grouping import LayerGrouping
from .architectures.table import ARCHITECTURES, find_architecture
from .checkpoint.opening import open_checkpoint
from .checkpoint.tensors import Checkpoint
from .describe.inspection import inspect_checkpoint
from .errors import KvConvertError
from .execute import execute
from .methods.cla import Cla
from .methods.gqa import Gqa
from .methods.mla import Mla
from .plan import ConversionPlan
from .runtime import register
from .translations.routes import ROUTES, as_cross_layer, as_latent_source, as_target

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
