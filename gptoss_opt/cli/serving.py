"""What `serve` does: a model is loaded as planned, and served until it is asked to stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..finetune.recipe import tokenizer_of
from ..planner import RELEASED_AT
from . import show

API_KEY = "GPTOSS_OPT_API_KEY"
"""The environment variable with the key that clients must send."""

CODE = """\
{os}from transformers import AutoTokenizer

from gptoss_opt import optimize
from gptoss_opt.endpoint import run

model = {optimize}
tokenizer = AutoTokenizer.from_pretrained({source})
run(
    model,
    tokenizer,
    {options},
)
"""


def name_of(model: str) -> str:
    """What clients call a model that is given so: the last part of its folder or of its name on the hub."""
    return Path(RELEASED_AT.get(model, model)).resolve().name


def code(model: str, planned: Mapping[str, Any], options: Mapping[str, Any], *, with_key: bool) -> str:
    """Python that does the same. A key is read from the environment, and not written down."""
    lines = [f"{name}={show.written(value)}" for name, value in options.items() if value is not None]
    if with_key:
        lines.append(f"api_key=os.environ[{show.written(API_KEY)}]")
    return CODE.format(
        os="import os\n\n" if with_key else "",
        optimize=show.call("optimize", [model], planned),
        source=show.written(RELEASED_AT.get(model, model)),
        options=",\n    ".join(lines),
    )


def serve(model: str, planned: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Load a model, and serve it. Raises `ValueError` if a package that it takes is missing; see also `run`."""
    try:
        from ..endpoint import run
    except ImportError as error:
        raise ValueError(str(error)) from error
    from .. import optimize

    made = optimize(model, **planned)
    run(made, tokenizer_of(made.plan.source), **options)
