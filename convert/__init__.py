"""Offline weight surgery: a checkpoint with a far smaller K/V cache than the one that it was made from.

    from kvconvert.convert import Calibration, Gqa, convert

    convert("model_dir", Gqa(num_key_value_heads=8, merge="svd"), "out", calibration=Calibration("text.jsonl"))

Knows nothing of training or of the command line; prints nothing. docs/library.md explains it.
"""

from .algebra.heads import HeadGrouping
from .algebra.layer_grouping import LayerGrouping
from .architectures.source import Source
from .architectures.table import ARCHITECTURES
from .calibration.text import CalibrationText, read_calibration_text
from .checkpoint.opening import open_checkpoint
from .checkpoint.overlay import Overlay
from .checkpoint.tensors import Checkpoint
from .conversion import Calibration, Conversion, convert
from .describe.cache_planning import CachePlan, plan_cache
from .describe.inspection import Inspection, inspect
from .errors import KvConvertError
from .execute import execute
from .methods.cla import Cla
from .methods.gqa import Gqa
from .methods.mla import Mla
from .methods.prepared import Preparation, Prepared
from .plan import ConversionPlan
from .runtime import register
from .text.sources import TextSource
from .translations.routes import ROUTES, as_cross_layer, as_latent_source, as_target

__all__ = [
    "ARCHITECTURES",
    "ROUTES",
    "CachePlan",
    "Calibration",
    "CalibrationText",
    "Checkpoint",
    "Cla",
    "Conversion",
    "ConversionPlan",
    "Gqa",
    "HeadGrouping",
    "Inspection",
    "KvConvertError",
    "LayerGrouping",
    "Mla",
    "Overlay",
    "Preparation",
    "Prepared",
    "Source",
    "TextSource",
    "as_cross_layer",
    "as_latent_source",
    "as_target",
    "convert",
    "execute",
    "inspect",
    "open_checkpoint",
    "plan_cache",
    "read_calibration_text",
]

register()
