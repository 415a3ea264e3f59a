"""What the package shows, imports and may not import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import gptoss_opt

PACKAGE = Path(gptoss_opt.__file__).parent

PUBLIC = {
    "BackendError",
    "CheckpointError",
    "CompatibilityError",
    "ContinuousBatcher",
    "GenerationError",
    "IrreversibleError",
    "Stack",
    "Wrapper",
    "__version__",
    "balance_experts",
    "compose",
    "explain",
    "gather_state_dict",
    "init_distributed",
    "load",
    "shard_experts",
    "shard_tensor_parallel",
    "stack_of",
    "undo",
    "with_fast_experts",
    "with_flash_attention",
    "with_mxfp4_experts",
}

# Who may import whom, inside the package. Nothing imports upward, and wrappers never import each other.
LAYERS: dict[str, set[str]] = {
    "table": set(),
    "core": {"table"},
    "kernels": set(),
    "distributed": {"core"},
    "model": {"core", "distributed", "kernels"},
    "wrappers": {"core", "distributed", "kernels", "model"},
    "serve": {"core", "distributed", "kernels", "model", "wrappers"},
    "load": {"core", "model"},
    "version": set(),
    "testing": set(),
    "demo": {"table", "testing", "core", "load", "model", "serve", "wrappers", ""},
    "cli": {"demo", ""},
    "__main__": {"cli"},
    "__init__": {"core", "distributed", "load", "model", "serve", "wrappers", "version"},
}
# Third parties a layer may know; every layer may know torch and the standard library.
KNOWN = {
    "core": {"tqdm"},
    "kernels": {"packaging", "flash_attn", "flash_attn_interface", "triton"},
    "model": {"accelerate", "huggingface_hub", "tqdm", "transformers"},
    "load": {"tqdm", "transformers"},
    "serve": {"psutil", "tqdm", "transformers"},
}
KNOWN |= {"testing": {"safetensors", "tqdm"}, "demo": {"safetensors", "transformers", "tqdm"}}


def imports(path: Path) -> list[str]:
    """Absolute names of all that a file imports, relative imports resolved."""
    package = ["gptoss_opt", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append(".".join([*base, *([node.module] if node.module else [])]))
    return found


def test_public_names() -> None:
    assert set(gptoss_opt.__all__) == PUBLIC
    assert gptoss_opt.__all__ == sorted(gptoss_opt.__all__)
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(gptoss_opt, name)), f"{name} has no docstring"


def test_layers() -> None:
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        layer = parts[0]
        for name in imports(path):
            head, *rest = name.split(".")
            if head == "gptoss_opt":
                target = rest[0] if rest else ""
                assert target == layer or target in LAYERS[layer], f"{path.name}: {layer} imports {name}"
                if layer == "wrappers" and target == "wrappers":
                    raise AssertionError(f"{path.name} imports another wrapper: {name}")
            elif head not in sys.stdlib_module_names | {"torch"}:
                assert head in KNOWN.get(layer, set()), f"{path.name}: {layer} imports {name}"


def test_no_file_holds_two_ideas() -> None:
    long = {path.name: lines for path in PACKAGE.rglob("*.py") if (lines := len(path.read_text().splitlines())) > 350}
    assert not long


def test_imports_without_anything_optional() -> None:
    code = """
import sys
for name in ("triton", "flash_attn", "flash_attn_interface", "peft", "kernels"):
    sys.modules[name] = None
import gptoss_opt
assert gptoss_opt.with_flash_attention(backend="torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
