"""Classes that transformers lacks, for converted checkpoints that no stock class holds.

The files of a class are copied beside the weights, where `trust_remote_code=True` finds them through `auto_map`.
`register` makes transformers know them in this process, so that kvconvert itself never needs that.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

__all__ = ["RUNTIME_CLASSES", "RuntimeClass", "register"]


@dataclass(frozen=True)
class RuntimeClass:
    """A class of our own: the stem of its files, `configuration_STEM.py` and `modeling_STEM.py`, and its names.

    `auto_models` maps transformers' auto classes to the classes of the modeling file.
    """

    model_type: str
    stem: str
    config: str
    auto_models: Mapping[str, str]

    @property
    def architecture(self) -> str:
        """The class that config.json names."""
        return next(name for auto, name in self.auto_models.items() if auto != "AutoModel")

    @property
    def files(self) -> tuple[Path, ...]:
        names = (f"configuration_{self.stem}", f"modeling_{self.stem}", "transformers_interface")
        return tuple(Path(__file__).parent / f"{name}.py" for name in names)

    def config_class(self) -> Any:
        return getattr(import_module(f"{__name__}.configuration_{self.stem}"), self.config)

    def model_classes(self) -> dict[str, Any]:
        """The classes by the auto class that opens them.

        Raises ImportError, with the versions, where this version of transformers lacks what they rely on.
        """
        modeling = import_module(f"{__name__}.modeling_{self.stem}")
        return {auto: getattr(modeling, name) for auto, name in self.auto_models.items()}

    @property
    def auto_map(self) -> dict[str, str]:
        """The entry of config.json with which `trust_remote_code=True` finds the class in the files beside it."""
        models = {auto: f"modeling_{self.stem}.{name}" for auto, name in self.auto_models.items()}
        return {"AutoConfig": f"configuration_{self.stem}.{self.config}"} | models


_CLASSES = (
    RuntimeClass(
        "cross_layer_decoder",
        "cross_layer_decoder",
        "CrossLayerDecoderConfig",
        {"AutoModel": "CrossLayerDecoderModel", "AutoModelForCausalLM": "CrossLayerDecoderForCausalLM"},
    ),
    RuntimeClass(
        "grouped_decoder",
        "grouped_decoder",
        "GroupedDecoderConfig",
        {"AutoModel": "GroupedDecoderModel", "AutoModelForCausalLM": "GroupedDecoderForCausalLM"},
    ),
    *(
        RuntimeClass(
            f"grouped_{name.lower()}",
            "grouped_seq2seq",
            f"Grouped{name}Config",
            dict.fromkeys((auto, "AutoModel"), f"Grouped{name}ForConditionalGeneration"),
        )
        for name, auto in (
            ("Bart", "AutoModelForSeq2SeqLM"),
            ("T5", "AutoModelForSeq2SeqLM"),
            ("Whisper", "AutoModelForSpeechSeq2Seq"),
        )
    ),
)

RUNTIME_CLASSES: Mapping[str, RuntimeClass] = MappingProxyType({entry.model_type: entry for entry in _CLASSES})


def register() -> None:
    """Make transformers' auto classes know ours, as soon as it is imported: importing it here would take seconds.

    Where one of our files is what imports it, its class is registered as soon as that file is there.
    """
    own = {f"{__name__}.{file.stem}" for entry in _CLASSES for file in entry.files}
    names = {"transformers", *own}
    sys.meta_path.insert(0, _Watch(names - sys.modules.keys()))
    for name in sorted(names & sys.modules.keys()):
        _register(sys.modules[name])


class _Watch:
    """Has `_register` called after each of these modules is imported. A library for it takes 90 ms to import itself."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find one of the modules as if this were not here, and wrap its loader."""
        if name not in self._names:
            return None
        self._names.remove(name)
        try:
            spec = find_spec(name)
        finally:
            self._names.add(name)
        if spec is not None and spec.loader is not None:
            loader: Any = _WatchedLoader(spec.loader)
            spec.loader = loader
        return spec


class _WatchedLoader:
    """Loads a module as its loader does, which the module shows as its own, and calls `_register`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)


def _is_being_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def _register(module: ModuleType) -> None:
    """Called once `module` is there, transformers or a file of ours."""
    import transformers

    for entry in _CLASSES:
        files = {f"{__name__}.{file.stem}" for file in entry.files}
        if any(_is_being_imported(name) for name in files - {module.__name__}):
            continue
        config_class = entry.config_class()
        transformers.AutoConfig.register(entry.model_type, config_class, exist_ok=True)
        try:
            models = entry.model_classes()
        except ImportError as error:  # of `require`: importing transformers must not fail for it
            warnings.warn(
                f"{entry.model_type} checkpoints cannot be opened here: {error}", RuntimeWarning, stacklevel=2
            )
            continue
        for auto, model_class in models.items():
            getattr(transformers, auto).register(config_class, model_class, exist_ok=True)
