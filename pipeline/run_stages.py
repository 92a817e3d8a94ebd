"""The stages of a recipe: what each reads, leaves and does, with everything checked that can be before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.architectures.context import longest_context
from ..convert.checkpoint.files import write_text
from ..convert.checkpoint.hub import write_token
from ..convert.checkpoint.manifest import PROVENANCE_NAME, listed_files, read_provenance
from ..convert.checkpoint.opening import open_checkpoint
from ..convert.checkpoint.original import find_original
from ..convert.checkpoint.output import CARD_NAME
from ..convert.checkpoint.remote_code import allow_remote_code
from ..convert.checkpoint.source_files import weight_files
from ..convert.checkpoint.tensors import Checkpoint
from ..convert.conversion import Calibration, Progress, convert, no_progress
from ..convert.errors import InputError
from ..convert.execute import sketched
from ..convert.methods.method import Method
from ..convert.printable import jsonable
from ..measure.benchmarking import benchmark
from ..measure.evaluation import evaluate
from ..measure.gates import Limits, check_limits, read_baseline
from ..measure.results import evaluation_summary, write_hub_results
from ..uptrain.estimate.cost import require_consent
from .conversion_options import calibration_of, cla_of, gqa_of, mla_of, mqa_of
from .option_groups import BENCHMARK, EVALUATION, LENGTH, MACHINE, MONITORING, TASKS, TRAINING, TRAINING_TEXT
from .pins import known_pins, pinned
from .recipe_file import RecipeFile, recipe_text
from .recipe_schema import CONVERSIONS, RecipeOptions

if TYPE_CHECKING:
    from ..uptrain import UptrainPlan, UptrainRequest

__all__ = ["STAGES", "RunJob", "Stage", "conversion_of"]

STAGES = ("convert", "uptrain", "evaluate", "benchmark", "report", "push")
"""The stages of a run, in order; those that the recipe does not mention are left out."""

RECIPE_NAME = "recipe.yaml"
CONVERTED, UPTRAINED, EVALUATION_NAME, BENCHMARK_NAME = "converted", "uptrained", "evaluation.json", "benchmark.json"
WORK, PICTURES = "work", "pictures"
_STORY = (CARD_NAME, RECIPE_NAME, PROVENANCE_NAME)  # which the report writes anew beside the weights


@dataclass(frozen=True)
class Stage:
    """A stage: the settings that decide its result, what it reads, what it leaves, and what does it.

    `texts` are places that are read whole, where new files count; `known` has digests of files that need not be read.
    `do` returns what the stage says of itself.
    """

    name: str
    settings: Mapping[str, Any]
    do: Callable[[], Mapping[str, Any]]
    inputs: Callable[[], Sequence[Path]]
    outputs: Callable[[], Sequence[Path]]
    texts: Sequence[Path] = ()
    known: Callable[[], Mapping[str, str]] = dict


@dataclass
class RunJob:
    """A recipe with its models and its place; `converted` is what its conversion makes, or what was converted before.

    `original` is None where nothing says what was converted, and `method` where nothing is converted.
    """

    file: RecipeFile
    place: Path
    converted: Path
    command: str
    original: Checkpoint | None
    method: Method | None
    progress: Progress = no_progress
    remark: Callable[[str], object] = lambda text: None
    show: Callable[[dict[str, Any]], object] = lambda record: None

    @classmethod
    def of(
        cls,
        file: RecipeFile,
        *,
        model: str | None = None,
        output: str | Path | None = None,
        headers_only: bool = False,
        command: str = "",
        progress: Progress = no_progress,
        remark: Callable[[str], object] = lambda text: None,
        show: Callable[[dict[str, Any]], object] = lambda record: None,
    ) -> RunJob:
        """Open the original of a recipe; `model` is a checkpoint that is converted already, in place of the recipe's.

        Raises InputError for what is wrong by then.
        """
        allow_remote_code(file.recipe.trust_remote_code)
        place = Path(output) if output is not None else default_place(file)
        original, method = None, None
        converted = file.recipe.model if model is None else model
        if file.recipe.convert is None or model is not None:
            original = find_original(converted)
            if original is not None:
                remark(
                    f"the original is {original.directory}, as the manifest of {converted} says, with the same digests"
                )
        else:
            method = conversion_of(file)[0]
            original = open_checkpoint(file.recipe.model, revision=file.recipe.revision, headers_only=headers_only)
            converted = str(place / CONVERTED)
        return cls(file, place, Path(converted), command, original, method, progress, remark, show)

    def pin(self) -> None:
        """Read from the hub what is there now, or what an earlier part of the run has read."""
        recipe = pinned(self.file.recipe, self.original, known_pins(self.place / RECIPE_NAME), self.remark)
        self.file = replace(self.file, recipe=recipe)

    def check(self) -> None:
        """Raise InputError for what would only be found hours later: settings, texts, gates, what is not installed."""
        recipe, file = self.file.recipe, self.file
        if not any(getattr(recipe, name) for name in STAGES[:-2]):
            raise InputError(f"{file.path}: has none of the sections {', '.join(STAGES[:-2])}")
        if recipe.gates is not None and recipe.evaluate is None:
            raise InputError(f"{file.where('gates')}: gates are of an evaluation", hint="add a section evaluate")
        if recipe.convert is not None:
            assert self.original is not None
            assert self.method is not None
            with _named(file, "convert"), self.method.source(self.original) as source:
                self.method.check(source)
        if recipe.uptrain is not None:
            with _named(file, "uptrain"):
                _check_length(recipe.uptrain)
                self.uptraining_request()
        if recipe.evaluate is not None:
            self._check_evaluation()
        if recipe.benchmark is not None:
            with _named(file, "benchmark"):
                self._check_contexts(RecipeOptions(BENCHMARK, recipe.benchmark).build())
        if recipe.report.pictures:
            from ..measure.pictures import require_matplotlib

            with _named(file, "report"):
                require_matplotlib()

    def _check_evaluation(self) -> None:
        with _named(self.file, "evaluate"):
            settings, tasks = self._evaluation_settings()
            for text in self.file.recipe.evaluate.data:
                settings.source(text)
            if self.file.recipe.evaluate.hub_results and not tasks.tasks:
                raise InputError("hub_results is about tasks, and none is named", hint="name tasks, or leave it out")
            if tasks.tasks:
                from ..measure.tasks import load_tasks

                load_tasks(tasks)
        with _named(self.file, "gates"):
            self._limits()

    def check_push(self) -> None:
        """Raise InputError where the result is to be pushed, and there is no token."""
        if self.file.recipe.push is not None:
            with _named(self.file, "push"):
                write_token()

    @property
    def why_no_sketch(self) -> str | None:
        """Why it is not known from headers what the conversion will make, if it is not."""
        if self.converted.is_dir() or self.method is None or self.original is None:
            return None
        if self.original.path is None:
            return "known once the model is on this machine"
        return "known once the layers that share are chosen on the text" if self.method.needs_choice else None

    def check_uptraining(self, *, force: bool = False) -> None:
        """Raise InputError for what would be refused when the uptraining begins, hours of converting later.

        It is planned with a sketch of the converted model, where that is not there yet and headers are enough to know
        what it will be. With `force` the result of another uptraining may be there.
        """
        if self.why_no_sketch is not None:
            return
        with _named(self.file, "uptrain"), self.sketched() as model:
            request = replace(self.uptraining_request(), model=model, force=force)
            plan = self.uptraining_plan(request)
            require_consent(plan.cost, plan.budget.explicit, request.length.yes)

    @contextmanager
    def sketched(self) -> Iterator[Path]:
        """The converted model, or as far as headers say it what the conversion will make: `why_no_sketch` is None."""
        if self.converted.is_dir() or self.method is None or self.original is None:
            yield self.converted
            return
        with ExitStack() as stack:
            source = stack.enter_context(self.method.source(self.original))
            yield stack.enter_context(sketched(self.method.resolve(source).plan(source), source.checkpoint))

    def _check_contexts(self, settings: Any) -> None:
        """Raise InputError for a context that the model does not take."""
        if self.original is None or self.original.path is None:
            return
        longest, needed = longest_context(self.original.directory), max(settings.contexts) + settings.num_new_tokens
        if longest is not None and needed > longest:
            raise InputError(
                f"a context of {max(settings.contexts)} and {settings.num_new_tokens} new tokens do not fit the model, "
                f"which takes {longest}",
                hint=f"time contexts of {longest - settings.num_new_tokens} or less",
            )

    @property
    def model(self) -> Path:
        """The checkpoint that the run ends with."""
        return self.place / UPTRAINED if self.file.recipe.uptrain is not None else self.converted

    @property
    def stages(self) -> list[Stage]:
        """The stages that the recipe has, but for the report."""
        recipe = self.file.recipe
        made = {
            "convert": self._convert_stage,
            "uptrain": self._uptrain_stage,
            "evaluate": self._evaluate_stage,
            "benchmark": self._benchmark_stage,
        }
        return [make() for name, make in made.items() if getattr(recipe, name) is not None]

    @property
    def resolved(self) -> str:
        """The recipe with all overrides and defaults, in YAML that makes the same again."""
        heading = (
            f"What `kvconvert run` (version {version('kvconvert')}) has carried out, with all defaults.\n"
            "kvconvert run on this file makes the same again."
        )
        recipe = self.file.recipe.model_copy(update={"output": None})
        return recipe_text(recipe, self.place, heading)

    def _convert_stage(self) -> Stage:
        assert self.original is not None
        original, section = self.original, self.file.recipe.convert
        method, calibration, kept = conversion_of(self.file)
        text = [] if calibration is None else calibration.places_read
        recorded = ("source_files", original.directory), ("files", self.converted)

        def do() -> Mapping[str, Any]:
            result = convert(
                self.file.recipe.model,
                method,
                self.converted,
                calibration=calibration,
                revision=self.file.recipe.revision,
                max_shard_bytes=section.max_shard_size,
                jobs=section.jobs,
                allow_nonfinite=section.allow_nonfinite,
                force=True,  # what is there without a record is a run's that was ended
                work_dir=self.place / WORK if method.needs_measurements else None,
                progress=self.progress,
                remark=self.remark,
            )
            if result.plan.method == "mean" and result.plan.changes_cache and not result.plan.source.cross_attention:
                self.remark("the mean of heads harms a decoder before uptraining; method: svd keeps most of it")
            return result.to_json() | {"output": CONVERTED}

        return Stage(
            name="convert",
            settings={"model": _identity(self.file.recipe), "options": kept},
            do=do,
            inputs=lambda: [original.directory / name for name in weight_files(original)],
            outputs=lambda: _checkpoint_files(self.converted),
            texts=text,
            known=lambda: _digests(self.converted, recorded),
        )

    def _uptrain_stage(self) -> Stage:
        section = self.file.recipe.uptrain
        request = self.uptraining_request()
        changes_nothing = {"yes", *MACHINE.fields, *MONITORING.fields}
        if section.keep_best:  # of the steps that are scored
            changes_nothing -= {"eval_steps"}
        settings = section.model_dump(mode="json", exclude=changes_nothing)

        def do() -> Mapping[str, Any]:
            from ..uptrain import carry_out, joined_processes, summarise

            plan = self.uptraining_plan(request)
            with joined_processes():
                result = carry_out(
                    plan, progress=self.progress, remark=self.remark, show=self.show, command=self.command
                )
            return summarise(plan, result) | {"output": UPTRAINED, "model": CONVERTED, "teacher": str(request.teacher)}

        return Stage(
            name="uptrain",
            settings=settings,
            do=do,
            inputs=lambda: _checkpoint_files(self.converted),
            outputs=lambda: _checkpoint_files(self.place / UPTRAINED),
            texts=[each.text.path for each in _training_texts(request)],
            known=lambda: _digests(self.converted, [("files", self.converted), ("files", self.place / UPTRAINED)]),
        )

    def _evaluate_stage(self) -> Stage:
        recipe = self.file.recipe
        section, (settings, tasks) = recipe.evaluate, self._evaluation_settings()
        target, place = self.place / EVALUATION_NAME, self.place
        before = self.converted if recipe.uptrain is not None and self.original is not None else None

        def do() -> Mapping[str, Any]:
            evaluation = evaluate(
                self.model,
                section.data,
                against=None if self.original is None else self.original.directory,
                before=before,
                settings=settings,
                tasks=tasks,
                output=place / "tasks" if tasks.tasks else None,
                progress=self.progress,
                remark=self.remark,
            )
            gates = check_limits(evaluation, self._limits())
            data = [Path(text).name if os.path.lexists(text) else text for text in section.data]
            content = evaluation_summary(self.model.name, data, settings, evaluation, gates)
            write_text(target, json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n")
            if section.hub_results:
                write_hub_results(place, evaluation.tasks)
            return {"gates": [asdict(gate) for gate in gates]}

        models = [self.model, *([before] if before is not None else [])]
        original = [] if self.original is None else [self.original]
        return Stage(
            name="evaluate",
            settings={
                "evaluate": section.model_dump(mode="json"),
                "gates": None if recipe.gates is None else recipe.gates.model_dump(mode="json"),
            },
            do=do,
            inputs=lambda: [
                *(path for model in models for path in _checkpoint_files(model)),
                *(each.directory / name for each in original for name in weight_files(each)),
            ],
            outputs=lambda: [target],
            texts=[settings.source(text).path for text in section.data],
            known=lambda: _digests(
                self.model,
                [*(("files", model) for model in models), *(("source_files", each.directory) for each in original)],
            ),
        )

    def _benchmark_stage(self) -> Stage:
        recipe = self.file.recipe
        section = recipe.benchmark
        settings = RecipeOptions(BENCHMARK, section).build()
        target = self.place / BENCHMARK_NAME

        def do() -> Mapping[str, Any]:
            timed = benchmark(
                self.model,
                against=None if self.original is None else self.original.directory,
                settings=settings,
                progress=self.progress,
            )
            content = {"model": self.model.name, "settings": asdict(settings)} | asdict(timed)
            write_text(target, json.dumps(jsonable(content), indent=2, allow_nan=False) + "\n")
            if recipe.report.pictures:
                from ..measure.pictures import decode_times, draw_decode

                (self.place / PICTURES).mkdir(exist_ok=True)
                draw_decode(self.place / PICTURES / "decode.png", decode_times(timed))
            return {}

        return Stage(
            name="benchmark",
            settings=section.model_dump(mode="json"),
            do=do,
            inputs=lambda: _checkpoint_files(self.model),
            outputs=lambda: [target],
            known=lambda: _digests(self.model, [("files", self.model)]),
        )

    def uptraining_request(self) -> UptrainRequest:
        """What is asked of the uptraining. Raises InputError for what contradicts itself."""
        from ..uptrain import UptrainRequest

        recipe = self.file.recipe
        section = recipe.uptrain
        if section.no_teacher and section.teacher is not None:
            raise InputError("teacher and no_teacher rule each other out", hint="leave out one of them")
        original = None if self.original is None else self.original.directory
        teacher = None if section.no_teacher else section.teacher or original
        if teacher is None and not section.no_teacher:
            raise InputError(
                f"{self.converted} has no manifest that names its original",
                hint="name it with teacher, or say no_teacher: true",
            )
        return UptrainRequest(
            model=self.converted,
            data=tuple(section.data),
            output=self.place / UPTRAINED,
            teacher=teacher,
            length=RecipeOptions(LENGTH, section).build(),
            text=RecipeOptions(TRAINING_TEXT, section).build(),
            settings=RecipeOptions(TRAINING, section).build(),
            machine=RecipeOptions(MACHINE, section).build(),
            monitoring=RecipeOptions(MONITORING, section).build(),
        )

    def uptraining_plan(self, request: UptrainRequest) -> UptrainPlan:
        """The checked plan of the uptraining."""
        from ..uptrain import plan_uptraining

        try:
            return plan_uptraining(request, remark=self.remark)
        except InputError as error:
            if error.hint is not None and "--force" in error.hint:  # which a run does not have
                error.hint = "--from uptrain makes it again; or choose another --output"
            raise

    def _evaluation_settings(self) -> tuple[Any, Any]:
        section = self.file.recipe.evaluate
        tasks = RecipeOptions(TASKS, section)
        return RecipeOptions(EVALUATION, section).build(), tasks.build(tasks=tuple(tasks.values["tasks"]))

    def _limits(self) -> Limits:
        gates, has_tasks = self.file.recipe.gates, bool(self.file.recipe.evaluate.tasks)
        if gates is None:
            return Limits()
        compared = [name for name in ("max_ppl_increase", "max_kl", "min_recovery") if getattr(gates, name) is not None]
        if compared and self.original is None:
            raise InputError(f"{compared[0]} compares with the original, which is not known")
        if gates.min_recovery is not None and self.file.recipe.uptrain is None and not has_tasks:
            raise InputError("min_recovery is about uptraining or tasks", hint="add one of them, or leave it out")
        baseline = None if gates.baseline is None else read_baseline(gates.baseline)
        return Limits(gates.max_ppl_increase, gates.min_recovery, gates.max_kl, baseline)


def default_place(file: RecipeFile) -> Path:
    """The directory of a run: the recipe's `output`, or the name of its file in the current directory."""
    if file.recipe.output is not None:
        return Path(file.recipe.output)
    place = Path(file.path.stem)
    if place.absolute() == file.path.parent.absolute():  # of a run's own recipe.yaml
        return Path(f"{place}-run")
    return place


def conversion_of(file: RecipeFile) -> tuple[Method, Calibration | None, dict[str, Any]]:
    """The method and the text of a recipe's conversion, and all of its options that decide the result.

    Raises InputError, with the place, for options that contradict each other, or that the method would ignore.
    """
    section = file.recipe.convert
    kind = CONVERSIONS[section.target]
    chosen, text = RecipeOptions(kind.method, section), RecipeOptions(kind.text, section)
    with _named(file, "convert"):
        method: Method
        if section.target == "cla":
            method = cla_of(chosen, text, section.kv_source_layers)
        else:
            method = {"gqa": gqa_of, "mqa": mqa_of, "mla": mla_of}[section.target](chosen, text)
        calibration = calibration_of(text)[0] if method.needs_measurements else None
    return method, calibration, section.model_dump(mode="json", exclude={"jobs", "save_statistics"})


def _check_length(section: Any) -> None:
    given = [name for name in ("steps", "tokens", "fraction") if getattr(section, name) is not None]
    if len(given) > 1:
        raise InputError(
            f"{' and '.join(given)} each say how long it is",
            hint=f"leave out one of them; --set uptrain.{given[0]}=null takes it away",
        )


@contextmanager
def _named(file: RecipeFile, section: str) -> Iterator[None]:
    """Errors inside the block say where in the recipe the section is, or the key that they are about."""
    try:
        yield
    except InputError as error:
        raise file.wrong(error, section) from error


def _identity(recipe: Any) -> dict[str, Any]:
    """What the original is called: a directory by its name alone, as it may lie elsewhere with the same bytes."""
    path = Path(recipe.model).expanduser()
    return {"name": path.resolve().name if path.is_dir() else recipe.model, "revision": recipe.revision}


def _checkpoint_files(directory: Path) -> list[Path]:
    """The files that a manifest lists, less those that a report writes again; of any other directory the weights."""
    listed = listed_files(read_provenance(directory)) if directory.is_dir() else None
    if listed is None:
        checkpoint = open_checkpoint(directory)
        return [checkpoint.directory / name for name in weight_files(checkpoint)]
    return [directory / file.name for file in listed if file.name not in _STORY]


def _digests(converted: Path, lists: Sequence[tuple[str, Path]]) -> dict[str, str]:
    """The digests that manifests list, of files that were just written or read, by their paths."""
    found: dict[str, str] = {}
    for name, directory in lists:
        record = read_provenance(converted if name == "source_files" else directory)
        found |= {str(directory / each["name"]): each["digest"] for each in record.get(name, ())}
    return found


def _training_texts(request: UptrainRequest) -> list[Any]:
    from ..uptrain.data.sources import WeightedSource, parse_source

    found = [
        each if isinstance(each, WeightedSource) else parse_source(str(each), request.text.defaults)
        for each in request.data
    ]
    held_out = request.text.held_out
    return [*found, *([] if held_out is None else [WeightedSource(held_out)])]
