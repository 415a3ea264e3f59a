"""What the package shows, imports and may not import."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import gptoss_opt
from gptoss_opt import extend

PACKAGE = Path(gptoss_opt.__file__).parent

PUBLIC = {
    "BackendError",
    "Benchmark",
    "CheckpointError",
    "CompatibilityError",
    "ContinuousBatcher",
    "GenerationError",
    "HardwareError",
    "IrreversibleError",
    "Plan",
    "PlanError",
    "Rollouts",
    "Stack",
    "Verification",
    "Wrapper",
    "__version__",
    "adapters_off",
    "balance_experts",
    "bench",
    "compose",
    "doctor",
    "explain",
    "export",
    "gather_state_dict",
    "init_distributed",
    "load",
    "load_adapter",
    "merge_lora",
    "monitor_of",
    "optimize",
    "plan",
    "save_adapter",
    "shard_experts",
    "shard_tensor_parallel",
    "stack_of",
    "undo",
    "verify",
    "with_chunked_loss",
    "with_fast_experts",
    "with_fast_linears",
    "with_flash_attention",
    "with_full_finetuning",
    "with_lora",
    "with_monitor",
    "with_mxfp4_experts",
}

EXTEND = {
    "GPT_OSS",
    "STORAGES",
    "Attachment",
    "Axis",
    "Backend",
    "Choice",
    "Form",
    "Host",
    "Journal",
    "Layout",
    "LayoutError",
    "Phase",
    "Report",
    "Split",
    "Storage",
    "Stored",
    "Wrapper",
    "check_name",
    "choose",
    "held_by",
    "layout_of",
    "mesh_of",
    "sqnr",
}

# Who may import whom, inside the package. Nothing imports upward, and wrappers never import each other.
LAYERS: dict[str, set[str]] = {
    "table": set(),
    "apart": set(),
    "kernels": set(),
    "layout": {"kernels"},
    "core": {"layout", "table"},
    "distributed": {"layout", "kernels"},
    "model": {"core", "distributed", "kernels", "layout"},
    "checkpoint": {"core", "distributed", "kernels", "layout", "model"},
    "parallel": {"checkpoint", "core", "distributed", "kernels", "layout", "model"},
    "wrappers": {"checkpoint", "core", "distributed", "kernels", "layout", "model", "monitoring", "parallel"},
    "serve": {"core", "distributed", "kernels", "model", "table", "wrappers"},
    "endpoint": {"core", "serve"},
    "train": {"checkpoint", "core", "distributed", "kernels", "layout", "model", "serve", "table"} | {"wrappers"},
    "evaluation": {"serve"},
    "finetune": {"checkpoint", "model", "table", "train", "wrappers"},
    "planner": {"checkpoint", "core", "distributed", "kernels", "layout", "model", "table", "wrappers"},
    "verification": {"core", "distributed", "kernels", "model", "table"},
    "benchmarking": {"apart", "checkpoint", "core", "model", "planner", "table", "verification"},
    "monitoring": {"core", "distributed", "model", "table"},
    "extend": {"core", "kernels", "layout", "model"},
    "version": set(),
    "testing": set(),
    "demo": {"apart", "benchmarking", "layout", "table", "testing", "model", "checkpoint", "serve", ""},
    "doctor": {"kernels", "planner", "table", "version"},
    "cli": {"demo", "doctor", "endpoint", "finetune", "planner", "serve", "table", ""},
    "__main__": {"cli"},
    "__init__": {"benchmarking", "checkpoint", "core", "distributed", "doctor", "model", "planner", "serve", "train"}
    | {"verification", "version", "wrappers"},
}
# Third parties a layer may know; every layer may know torch and the standard library.
KNOWN = {
    "layout": {"tqdm"},
    "kernels": {"packaging", "flash_attn", "flash_attn_interface", "triton"},
    "model": {"accelerate", "transformers"},
    "checkpoint": {"huggingface_hub", "packaging", "tqdm", "transformers"},
    "parallel": {"accelerate", "transformers"},
    "serve": {"psutil", "tqdm", "transformers"},
    "endpoint": {"anyio", "fastapi", "openai_harmony", "pydantic", "pydantic_core", "starlette", "uvicorn"},
    "evaluation": {"lm_eval", "tqdm"},
    "train": {"tqdm"},
    "verification": {"tqdm"},
    "benchmarking": {"tqdm", "transformers"},
    "monitoring": {"matplotlib", "psutil"},
    "cli": {"rich", "typer"},
    "finetune": {"matplotlib", "psutil", "tqdm", "transformers"},
}
KNOWN |= {"testing": {"safetensors", "tqdm"}, "demo": {"peft", "psutil", "transformers", "tqdm"}}
# Implementations import no sibling, but for a file of kernels that is theirs alone: (implementation, file).
OWN_KERNELS = {("triton", "triton_kernels")}

MODULES = {
    ".".join(("gptoss_opt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> list[str]:
    """Absolute names of all that a file imports, relative imports resolved; of ours, the modules that they lie in."""
    package = ["gptoss_opt", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found += [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, left = set(), list(graph[start])
        while left:
            node = left.pop()
            if node in graph and node not in found:
                found.add(node)
                left += graph[node]
        reached[start] = found
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(map(sorted, groups))


def test_public_names() -> None:
    assert set(gptoss_opt.__all__) == PUBLIC
    assert gptoss_opt.__all__ == sorted(gptoss_opt.__all__)
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(gptoss_opt, name)), f"{name} has no docstring"


def test_names_for_wrappers_of_your_own() -> None:
    assert set(extend.__all__) == EXTEND
    assert all(inspect.getdoc(getattr(extend, name)) for name in EXTEND)
    # The page that teaches it takes them from nowhere else.
    page = (PACKAGE.parent / "docs" / "writing_a_wrapper.md").read_text()
    taken = set(re.findall(r"^ *(?:from|import) (gptoss_opt[\w.]*)", page, re.MULTILINE))
    assert taken == {"gptoss_opt", "gptoss_opt.extend"}
    assert not re.search(r"gptoss_opt\.(?!extend\b)\w+\.\w|\b_[a-z]\w*\(", page)


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


def test_nothing_is_imported_in_a_circle() -> None:
    # Nor within functions or for types alone: that hides a circle, and cuts none.
    found = circles({name: set(imports(path)) for name, path in MODULES.items()})
    assert not found, "\n".join(" <-> ".join(circle) for circle in found)


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}, "f": {"a"}}
    assert circles(graph) == [["a", "b", "c"], ["e"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_implementations_stand_alone() -> None:
    names = [name for name in MODULES if ".impl." in name]
    assert {name.split(".")[2] for name in names} == {"attention", "experts", "paged_attention"}
    for name, path in MODULES.items():
        package, _, module = name.rpartition(".")
        for target in imports(path):
            folder, _, other = target.rpartition(".")
            if not folder.endswith(".impl"):
                continue
            if folder == package:
                assert (module, other) in OWN_KERNELS, f"{name} imports a sibling: {target}"
            else:
                # What is shared knows no implementation: backends name them, and the API may call the reference.
                assert name in {folder.removesuffix(".impl"), folder.replace(".impl", ".backends")}, f"{name}: {target}"


def test_no_file_holds_two_ideas() -> None:
    long = {path.name: lines for path in PACKAGE.rglob("*.py") if (lines := len(path.read_text().splitlines())) > 350}
    assert not long


def test_imports_without_anything_optional() -> None:
    code = """
import sys
for name in ("triton", "flash_attn", "flash_attn_interface", "peft", "kernels", "fastapi", "uvicorn", "lm_eval"):
    sys.modules[name] = None
import gptoss_opt
assert gptoss_opt.with_flash_attention(backend="torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
