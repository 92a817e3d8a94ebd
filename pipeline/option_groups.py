"""The options of the commands, as data: which fields of the library's settings can be typed, and by which names.

A command line and a recipe spell the same options, `--calibration-tokens 1M` and `calibration_tokens: 1M`; both are
made of these groups, so that neither has an option that the other lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

from ..convert.conversion import Calibration
from ..convert.methods.cla import Cla
from ..convert.methods.gqa import Gqa
from ..convert.methods.mla import Mla
from ..measure.evaluation import EvaluationSettings
from ..measure.speed import BenchmarkSettings
from ..measure.tasks import TaskSettings
from ..uptrain.request import Length, Machine, Monitoring, TextSettings, UptrainSettings
from .values import parse_count, parse_duration, parse_percentage, parse_size

__all__ = [
    "BENCHMARK",
    "CLA",
    "EVALUATION",
    "GQA",
    "LENGTH",
    "MACHINE",
    "MLA",
    "MONITORING",
    "MQA",
    "TASKS",
    "TEXT",
    "TRAINING",
    "TRAINING_TEXT",
    "GivenOptions",
    "OptionGroup",
]

Settings = TypeVar("Settings")
Parser = Callable[[str], Any]


@dataclass(frozen=True)
class OptionGroup(Generic[Settings]):
    """Options that fill the fields of a settings class.

    An option has its field's name, unless `names` says another; one that begins with no_ switches off a field that is
    true by default. `parsers` read fields that may be typed as text, such as 1B for a count. `bounds` are the least
    values, and fields in `omit` cannot be typed. `help` describes an option otherwise than its field is described.
    """

    settings: type[Settings]
    names: Mapping[str, str] = field(default_factory=dict)
    parsers: Mapping[str, Parser] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    omit: Sequence[str] = ()
    help: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that can be typed."""
        return tuple(each.name for each in fields(self.settings) if each.name not in self.omit)  # type: ignore[arg-type]

    def name(self, field_name: str) -> str:
        """The name of a field's option, with underscores."""
        return self.names.get(field_name, field_name)

    def without(self, *omit: str) -> OptionGroup[Settings]:
        """The group less some fields."""
        return replace(self, omit=(*self.omit, *omit))


class GivenOptions(Protocol):
    """What was typed for the fields of a settings class, on a command line or in a recipe."""

    @property
    def values(self) -> Mapping[str, Any]:
        """The values by the names of their fields."""

    def typed(self, names: Sequence[str] | None = None) -> list[str]:
        """The options, of all or of these fields, whose value is not the default, as they are spelled, in order."""

    def spell(self, name: str, value: object = None) -> str:
        """The option of a field as it is spelled there, with a value if one is given."""


_METHOD = {"merge": "method", "refit": "no_refit"}

GQA = OptionGroup(
    Gqa,
    names={**_METHOD, "num_key_value_heads": "groups"},
    bounds={"num_key_value_heads": 1, "head_dim": 2},
    omit=("refit_ridge",),
    help={
        "refit": "svd: keep the closed form; fit nothing to the text.",
        "allow_same": "Accept as many heads as the source has; none is pooled then.",
    },
)
MQA = GQA.without("num_key_value_heads", "grouping")
CLA = OptionGroup(
    Cla,
    names={
        **_METHOD,
        "num_key_value_heads": "groups",
        "num_key_value_layers": "kv_layers",
        "layers": "kv_source_layers",
    },
    bounds={"num_key_value_heads": 1, "num_key_value_layers": 1, "share": 2, "keep_first": 0, "keep_last": 0},
    omit=("layers", "refit_ridge"),
    help={"refit": "svd: keep the closed form; fit nothing to the text."},
)
MLA = OptionGroup(
    Mla,
    names={"refit": "no_refit", "rope_interleave": "rope_layout"},
    bounds={"kv_lora_rank": 1, "qk_rope_head_dim": 1, "v_head_dim": 1},
    omit=("rope_pairs", "refit_ridge"),
    help={"refit": "Keep the closed form; fit nothing to the text."},
)
TEXT = OptionGroup(
    Calibration,
    names={
        "data": "calibration",
        "num_tokens": "calibration_tokens",
        "sequence_length": "calibration_sequence_length",
        "config": "data_config",
        "weights_only": "no_calibration",
        "writing_seed": "calibration_seed",
    },
    bounds={"num_tokens": 1, "sequence_length": 2},
)

LENGTH = OptionGroup(
    Length,
    parsers={"tokens": parse_count, "fraction": parse_percentage, "pretraining_tokens": parse_count},
    bounds={"steps": 1},
)
TRAINING_TEXT = OptionGroup(TextSettings, bounds={"validation_fraction": 0})
TRAINING = OptionGroup(
    UptrainSettings,
    parsers={"global_batch_tokens": parse_count},
    bounds=dict.fromkeys(
        (
            *("kl_weight", "ce_weight", "layerwise_fraction", "lr_sweep", "body_lr_multiplier", "warmup_fraction"),
            *("weight_decay", "max_grad_norm"),
        ),
        0,
    ),
)
MACHINE = OptionGroup(Machine)
MONITORING = OptionGroup(
    Monitoring,
    parsers={"max_time": parse_duration},
    bounds=dict.fromkeys(("eval_steps", "save_steps", "log_steps"), 1),
)

EVALUATION = OptionGroup(
    EvaluationSettings,
    names={"config": "data_config"},
    bounds={"window": 2, "stride": 1, "context": 2, "max_windows": 1, "batch_size": 1, "samples": 0},
)
TASKS = OptionGroup(TaskSettings, bounds={"task_limit": 1, "num_fewshot": 0})
BENCHMARK = OptionGroup(
    BenchmarkSettings,
    names={"batches": "batch", "contexts": "context", "prefill": "no_prefill", "memory_bytes": "memory"},
    parsers={"memory_bytes": parse_size},
    bounds={"tokens": 1, "warm_up": 0, "repeats": 1},
)
