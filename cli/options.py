"""Options: those of the command line itself, and those that fill settings of the library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typing_extensions import Doc

from ..convert.checkpoint.remote_code import allow_remote_code
from ..convert.device import default_precision
from ..pipeline.option_groups import OptionGroup
from .console import stdout_errors

__all__ = [
    "BatchSize",
    "Command",
    "Data",
    "DryRun",
    "Force",
    "Given",
    "Json",
    "Model",
    "Output",
    "Precision",
    "PrecisionOption",
    "Quiet",
    "Revision",
    "SettingsOptions",
    "TrustRemoteCode",
    "accepts",
]

Settings = TypeVar("Settings")


def _output(flag: str, text: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Output")


class Precision(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def chosen(self) -> str:
        """ "bf16" or "fp32"."""
        return default_precision() if self is Precision.auto else self.value


PrecisionOption = Annotated[
    Precision, typer.Option(help="bf16: autocast over float32 weights; auto: where the machine is fast at it.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or a hub id such as org/name.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Where the result goes. Default: beside MODEL, with a suffix.",
        show_default=False,
        rich_help_panel="Output",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub id.", show_default=False, rich_help_panel="Model"),
]
DryRun = Annotated[bool, _output("--dry-run", "Print what would be done; write nothing.")]
Force = Annotated[bool, _output("--force", "Replace an existing output that kvconvert wrote.")]
Json = Annotated[bool, _output("--json", "Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, _output("--quiet", "No progress and no remarks.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=allow_remote_code,
        help="Run the code that lies beside a checkpoint.",
        rich_help_panel="Model",
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="Text: a file of text, JSON or parquet rows, a directory of them, or a dataset name. It may say its "
        "split, field, config and revision, as org/name[split=test,field=content]. Repeatable: each is scored.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")]


class Command(TyperCommand):
    """Its help lists options in groups, each under the name of its panel."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with stdout_errors():  # of --help
            return super().make_context(*arguments, **options)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                names, text = record
                names = names.removeprefix(" / ")  # of an option that only switches off
                groups.setdefault("Arguments" if is_argument else panel, []).append((names, text))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


@dataclass(frozen=True)
class SettingsOptions(Generic[Settings]):
    """Options that fill the fields of a settings class of the library, and stand under `panel` in the help.

    Name, default, least value and help of an option are those of the field in its group, and so is its type, text where
    the group has a parser for it. `short` adds a letter, `types` and `defaults` say what is typed in place of what the
    field holds, and `help` is another text.
    """

    name: str
    group: OptionGroup[Settings]
    panel: str
    short: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, inspect.Parameter]:
        """The parameters of a command, by the names of the fields that they fill."""
        hints = get_type_hints(self.group.settings, include_extras=True)
        defaults = {each.name: each.default for each in fields(self.group.settings)}  # type: ignore[arg-type]
        return {
            name: self._parameter(name, hints[name], self.defaults.get(name, defaults[name]))
            for name in self.group.fields
        }

    def flag(self, name: str) -> str:
        """The option of a field as people type it."""
        return f"--{self.group.name(name).replace('_', '-')}"

    def given(self, arguments: dict[str, Any], on_command_line: frozenset[str]) -> Given[Settings]:
        """Take the values of these options out of a command's arguments."""
        return Given(self, {name: arguments.pop(name) for name in self.fields}, on_command_line)

    def _parameter(self, name: str, hint: Any, default: Any) -> inspect.Parameter:
        described, documents = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
        text = next((document.documentation for document in documents if isinstance(document, Doc)), None)
        flags = [self.flag(name), *([self.short[name]] if name in self.short else [])]
        described = str | None if name in self.group.parsers else described
        if described is bool and default is True:
            flags = [f" /{flag}" for flag in flags]  # only the option that switches it off
        option = typer.Option(
            *flags,
            help=self.help.get(name) or self.group.help.get(name, text),
            rich_help_panel=self.panel,
            show_default=default is not MISSING and default is not None and not isinstance(default, bool),
            min=self.group.bounds.get(name),
        )
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[self.types.get(name, described), option],
        )


@dataclass(frozen=True)
class Given(Generic[Settings]):
    """What was typed for the fields of a settings class."""

    options: SettingsOptions[Settings]
    values: Mapping[str, Any]
    on_command_line: frozenset[str] = frozenset()

    def chosen(self) -> dict[str, tuple[str, Any]]:
        """What was typed and not left at its default, by the names of options with underscores: flag and value."""
        group = self.options.group
        return {
            group.name(name): (self.options.flag(name), self.values[name])
            for name in group.fields
            if name in self.on_command_line
        }

    def build(self, **more: Any) -> Settings:
        """The settings, some fields of which the command says itself. Raises InputError for text that is no value."""
        group = self.options.group
        read = {name: group.parsers[name](typed) for name, typed in self.values.items() if self._is_text(name)}
        return group.settings(**{**self.values, **read, **more})

    def _is_text(self, name: str) -> bool:
        return name in self.options.group.parsers and self.values[name] is not None

    def typed(self, names: Sequence[str] | None = None) -> list[str]:
        """The options, of all or of these fields, whose value is not the default, in the order of their names."""
        parameters = self.options.fields
        chosen = parameters if names is None else names
        return [self.options.flag(name) for name in sorted(chosen) if self.values[name] != parameters[name].default]

    def spell(self, name: str, value: object = None) -> str:
        """The option of a field as people type it, with a value if one is given."""
        return self.options.flag(name) + ("" if value is None else f" {value}")


def accepts(*groups: type | SettingsOptions[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of dataclasses as options, after its own parameters.

    It takes the options of a `SettingsOptions` as one argument of that name, a `Given`, and the fields of a dataclass
    of the command line, whose annotations are typer's, built, as `request`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        names = {group.name if isinstance(group, SettingsOptions) else "request" for group in groups}
        of_command = [
            parameter for name, parameter in inspect.signature(command).parameters.items() if name not in names
        ]
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
            for parameter in of_command
        ]
        for group in groups:
            parameters += group.fields.values() if isinstance(group, SettingsOptions) else _of_dataclass(group)

        def accepting(command_line: typer.Context, **arguments: Any) -> None:
            typed = frozenset(name for name in arguments if _is_typed(command_line, name))
            for group in groups:
                if isinstance(group, SettingsOptions):
                    arguments[group.name] = group.given(arguments, typed)
                else:
                    arguments["request"] = group(**{each.name: arguments.pop(each.name) for each in fields(group)})
            command(**arguments)

        own = inspect.Parameter("command_line", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters.insert(0, own)
        accepting.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        accepting.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        accepting.__name__, accepting.__doc__ = command.__name__, command.__doc__
        return accepting

    return decorate


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, be its value the default or not."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _of_dataclass(options: type) -> list[inspect.Parameter]:
    hints = get_type_hints(options, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(options)
    ]
