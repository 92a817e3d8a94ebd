"""For the site's Python API: a field `Annotated[int, Doc("…")]` is shown as an int whose docstring is the text."""

import ast
from collections.abc import Iterator
from typing import Any

from griffe import (
    Attribute,
    Class,
    Docstring,
    Expr,
    ExprCall,
    ExprName,
    ExprSubscript,
    ExprTuple,
    Extension,
    GriffeLoader,
    Module,
)


class Annotations(Extension):
    """Takes docstrings of fields from their annotations, or from those that a name of a module stands for.

    It runs before griffe's own extension makes the signatures of dataclasses of their fields.
    """

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        for field in _fields(pkg):
            annotation = field.annotation
            if isinstance(annotation, ExprName):
                annotation = _meaning(annotation, loader)
            parts = _parts(annotation)
            if parts:
                field.annotation, text = parts
                field.docstring = Docstring(text, parent=field)


def _fields(scope: Module | Class) -> Iterator[Attribute]:
    """The attributes of all classes, at any depth."""
    for member in scope.members.values():
        if member.is_alias:
            continue
        if isinstance(member, Module | Class):
            yield from _fields(member)
        elif isinstance(member, Attribute) and isinstance(scope, Class):
            yield member


def _meaning(name: ExprName, loader: GriffeLoader) -> str | Expr | None:
    """What a name of this package stands for where it is an alias of a type, else None."""
    try:
        found = loader.modules_collection.get_member(name.canonical_path)
    except (KeyError, ValueError):
        return None
    return found.value if isinstance(found, Attribute) else None


def _parts(annotation: str | Expr | None) -> tuple[str | Expr, str] | None:
    """The type and the text of Annotated[type, Doc(text)], or None for any other annotation."""
    if not isinstance(annotation, ExprSubscript) or not annotation.canonical_path.endswith(".Annotated"):
        return None
    if not isinstance(annotation.slice, ExprTuple):
        return None
    kind, *metadata = annotation.slice.elements
    texts = [
        entry.arguments[0]
        for entry in metadata
        if isinstance(entry, ExprCall) and entry.canonical_path.endswith(".Doc")
    ]
    return (kind, ast.literal_eval(str(texts[0]))) if texts else None
