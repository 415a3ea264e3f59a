"""How griffe reads the docstrings of this package for the API pages of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

MODEL = "nn.Module | None"


class OurDocstrings(griffe.Extension):
    """Reads `Example:` as griffe's `Examples:`, and gives what `@takes_model` decorates its first parameter."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each function, class and attribute that griffe has read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, griffe.Function) and any(str(one.value) == "takes_model" for one in obj.decorators):
            kind = griffe.ParameterKind.positional_or_keyword
            model = griffe.Parameter("model", annotation=MODEL, kind=kind, default="None")
            obj.parameters = griffe.Parameters(model, *obj.parameters)
