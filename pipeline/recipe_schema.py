"""What a recipe may say: its sections and keys, their types, defaults and help, all taken from the options of commands.

Sections are pydantic models made of `option_groups`, so that `kvconvert schema` describes each key as the help of the
command describes its option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, create_model
from typing_extensions import Doc

from ..convert.errors import InputError
from .option_groups import (
    BENCHMARK,
    CLA,
    EVALUATION,
    GQA,
    LENGTH,
    MACHINE,
    MLA,
    MONITORING,
    MQA,
    TASKS,
    TEXT,
    TRAINING,
    TRAINING_TEXT,
    OptionGroup,
)
from .values import parse_duration, parse_percentage, parse_size

__all__ = ["CONVERSIONS", "UPTRAINING", "Gates", "Push", "Recipe", "RecipeOptions", "Report", "json_schema"]

_SCHEMA = "https://json-schema.org/draft/2020-12/schema"


class _Section(BaseModel):
    """Keys that it does not know, and values of another type than they have, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class RecipeOptions:
    """What a section says of the options of one group: `GivenOptions` as a recipe spells them."""

    group: OptionGroup[Any]
    section: BaseModel

    @property
    def values(self) -> Mapping[str, Any]:
        """The values by the names of the fields."""
        return {name: _value(self.group, name, self.section) for name in self.group.fields}

    def typed(self, names: Sequence[str] | None = None) -> list[str]:
        """The keys, of all or of these fields, whose value is not the default, in order."""
        chosen = self.group.fields if names is None else names
        defaults = type(self.section).model_fields
        keys = [self.group.name(name) for name in sorted(chosen)]
        return [key for key in keys if getattr(self.section, key) != defaults[key].default]

    def spell(self, name: str, value: object = None) -> str:
        """The key of a field, with a value if one is given."""
        return self.group.name(name) + ("" if value is None else f": {value}")

    def build(self, **more: Any) -> Any:
        """The settings of the library. Raises InputError for what contradicts itself."""
        return self.group.settings(**{**self.values, **more})


def _value(group: OptionGroup[Any], name: str, section: BaseModel) -> Any:
    value = getattr(section, group.name(name))
    return not value if _is_switched_off(group, name) else value


def _is_switched_off(group: OptionGroup[Any], name: str) -> bool:
    """Whether the option of a field is one that switches it off: no_refit, of a field that is true by default."""
    default = next(each.default for each in fields(group.settings) if each.name == name)
    return default is True and group.name(name).startswith("no_")


# how a number is written so that its parser reads it again
_WRITERS: Mapping[Callable[[str], Any], Callable[[Any], str]] = {
    parse_percentage: lambda value: f"{format(100 * Decimal(str(value)), 'f')}%",
    parse_duration: lambda value: f"{value:.0f}s",
}


def _typed(parse: Callable[[str], Any], kind: Any) -> Any:
    """A number that may also be typed as text, such as 1B or 5%, and is read as on a command line in any case."""

    def read(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value
        try:
            return parse(value if isinstance(value, str) else format(Decimal(str(value)), "f"))
        except InputError as error:
            raise ValueError(str(error)) from error

    number = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]}
    notes = [BeforeValidator(read), WithJsonSchema(number)]
    if parse in _WRITERS:
        write = _WRITERS[parse]
        notes.append(PlainSerializer(lambda value: None if value is None else write(value)))
    return Annotated[kind, *notes]


def _keys(*groups: OptionGroup[Any]) -> dict[str, Any]:
    """The keys of a section that fill these groups, as `create_model` takes them."""
    found: dict[str, Any] = {}
    for group in groups:
        hints = get_type_hints(group.settings, include_extras=True)
        defaults = {each.name: each.default for each in fields(group.settings)}
        for name in group.fields:
            hint = hints[name]
            kind, notes = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
            text = next((note.documentation for note in notes if isinstance(note, Doc)), None)
            if name in group.parsers:
                kind = _typed(group.parsers[name], kind)
            switched_off = _is_switched_off(group, name)
            default = False if switched_off else ... if defaults[name] is MISSING else defaults[name]
            found[group.name(name)] = (
                kind,
                Field(default, description=group.help.get(name, text), ge=group.bounds.get(name)),
            )
    return found


_OUTPUT = {
    "max_shard_size": (
        _typed(parse_size, int),
        Field(5 * 10**9, ge=1, description="Largest weight file, for example 5GB."),
    ),
    "jobs": (
        int | None,
        Field(None, ge=1, description="Files read and written side by side. Default: a few."),
    ),
    "allow_nonfinite": (
        bool,
        Field(False, description="Keep weights that are infinite or not a number; otherwise they are refused."),
    ),
}


@dataclass(frozen=True)
class ConversionKind:
    """A target of the section `convert`: the options of its method and of its text."""

    method: OptionGroup[Any]
    text: OptionGroup[Any]


CONVERSIONS: Mapping[str, ConversionKind] = {
    "gqa": ConversionKind(GQA, TEXT),
    "mqa": ConversionKind(MQA, TEXT),
    "cla": ConversionKind(CLA, TEXT.without("statistics", "save_statistics", "weights_only")),
    "mla": ConversionKind(MLA, TEXT.without("statistics", "save_statistics")),
}
_OWN_KEYS: Mapping[str, dict[str, Any]] = {
    "cla": {
        "kv_source_layers": (
            str | None,
            Field(None, description="For each layer the one whose keys and values it reads, as 0,0,2,2."),
        )
    },
    "mla": {
        "rope_layout": (
            Literal["interleaved", "half-split"],
            Field("interleaved", description="Order of rotary pairs. half-split is for transformers and vLLM's own."),
        )
    },
}
_NAMES = {"gqa": "ConvertGqa", "mqa": "ConvertMqa", "cla": "ConvertCla", "mla": "ConvertMla"}


def _literal(value: str) -> Any:
    return Literal[value]


_CONVERT = tuple(
    create_model(
        _NAMES[target],
        __base__=_Section,
        __doc__=f"The options of `kvconvert mha2{target}`.",
        target=(_literal(target), Field(description="What the checkpoint becomes.")),
        **{**_keys(kind.method, kind.text), **_OWN_KEYS.get(target, {}), **_OUTPUT},
    )
    for target, kind in CONVERSIONS.items()
)

_Texts = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    Field(min_length=1),
]

UPTRAINING = (LENGTH, TRAINING_TEXT, TRAINING, MACHINE, MONITORING)
_Uptrain = create_model(
    "Uptrain",
    __base__=_Section,
    __doc__="The options of `kvconvert uptrain`.",
    data=(_Texts, Field(description="Text to train on, each perhaps with its weight, as a.jsonl:0.7.")),
    teacher=(
        str | None,
        Field(None, description="The model whose predictions are learnt. Default: the original."),
    ),
    no_teacher=(bool, Field(False, description="Learn from the text alone, by cross-entropy.")),
    **_keys(*UPTRAINING),
)
_Evaluate = create_model(
    "Evaluate",
    __base__=_Section,
    __doc__="The options of `kvconvert evaluate`.",
    data=(_Texts, Field(description="Held-out text; each is scored.")),
    hub_results=(bool, Field(False, description="Write .eval_results/<task>.yaml beside the model, for the hub.")),
    **_keys(EVALUATION, TASKS),
)
_Benchmark = create_model(
    "Benchmark", __base__=_Section, __doc__="The options of `kvconvert benchmark`.", **_keys(BENCHMARK)
)


if TYPE_CHECKING:  # their keys come from the options, which no type checker reads
    from typing import Any as BenchmarkSection
    from typing import Any as ConvertSection
    from typing import Any as EvaluateSection
    from typing import Any as UptrainSection
else:
    ConvertSection = Annotated[_CONVERT[0] | _CONVERT[1] | _CONVERT[2] | _CONVERT[3], Field(discriminator="target")]
    ConvertSection, UptrainSection = ConvertSection | None, _Uptrain | None
    EvaluateSection, BenchmarkSection = _Evaluate | None, _Benchmark | None


class Gates(_Section):
    """What the result has to keep; otherwise the run ends with exit code 3, and all that it made is kept."""

    max_ppl_increase: _typed(parse_percentage, float | None) = Field(  # type: ignore[valid-type]
        None, ge=0, description="The most that perplexity may lie above the original's, for example 5%."
    )
    min_recovery: _typed(parse_percentage, float | None) = Field(  # type: ignore[valid-type]
        None, description="The least part of the excess loss that uptraining has to win back, for example 95%."
    )
    max_kl: float | None = Field(None, ge=0, description="The largest KL to the original, in nats per token.")
    baseline: Path | None = Field(
        None, description="An evaluation.json of an earlier run on the same text, whose loss is not to be exceeded."
    )


class Report(_Section):
    """How the report looks."""

    title: str | None = Field(None, description="Its heading. Default: the model and what became of it.")
    pictures: bool = Field(True, description="Draw pictures, for which kvconvert[plot] is needed.")


class Push(_Section):
    """Where the result is published, once all gates are passed."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Repository of the hub, as org/name.")
    private: bool | None = Field(None, description="Whether it is private. Default: as the original.")
    create_pr: bool = Field(False, description="Open a pull request instead of a commit.")


class Recipe(_Section):
    """A conversion from a checkpoint to a result that is measured, and perhaps trained and published."""

    model: str = Field(description="The original: a checkpoint directory, or a hub id such as org/name.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    trust_remote_code: bool = Field(False, description="Run the code that lies beside a checkpoint.")
    output: Path | None = Field(
        None, description="Directory of the run. Default: the name of the recipe's file, in the current directory."
    )
    convert: ConvertSection = Field(
        None, description="How it is converted; a model that is converted already needs none."
    )
    uptrain: UptrainSection = Field(None, description="How the result is trained; none without.")
    evaluate: EvaluateSection = Field(None, description="How quality is measured against the original.")
    benchmark: BenchmarkSection = Field(None, description="How speed is measured against the original.")
    gates: Gates | None = Field(None, description="What the result has to keep.")
    report: Report = Field(default_factory=lambda: Report.model_validate({}), description="Title and pictures.")
    push: Push | None = Field(None, description="Where the result is published.")


def json_schema() -> dict[str, Any]:
    """The schema of recipes, for editors: JSON Schema 2020-12."""
    return {"$schema": _SCHEMA, "$id": "kvconvert-recipe", **Recipe.model_json_schema()}
