"""The site builds strictly and needs nothing from elsewhere, and what is generated in it is up to date."""

from __future__ import annotations

import ast
import html
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import gptoss_opt
from benchmarks.charts.draw import drawn
from benchmarks.charts.page import measured, page, picture, title
from benchmarks.charts.readme import table
from gptoss_opt import extend
from gptoss_opt.core import WRAPPERS
from gptoss_opt.kernels import native
from tests.docs import backends

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHAPE = [
    "What it does to your model",
    "When to use it",
    "What it costs",
    "Limits",
    "Example",
    "What it refuses",
]
WRAPPER_PAGES = {
    "with_flash_attention": "flash_attention.md",
    "with_mxfp4_experts": "mxfp4.md",
    "with_fast_experts": "fast_experts.md",
    "with_fast_linears": "fast_linears.md",
    "with_lora": "lora.md",
    "with_full_finetuning": "full_finetuning.md",
    "with_chunked_loss": "chunked_loss.md",
    "shard_tensor_parallel": "tensor_parallelism.md",
    "shard_experts": "expert_parallelism.md",
    "with_monitor": "monitor.md",
}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), ROOT / "benchmarks" / "README.md"]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def from_elsewhere(text: str) -> list[str]:
    """What a page or a style sheet loads from another host. Links that a reader follows are no part of it."""
    tags = "<(?:script|img|iframe|source|video|audio|embed|link)"
    loads = re.findall(tags + r"\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", text)
    return loads + re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", text)


def test_the_site_needs_nothing_from_elsewhere(site: Path) -> None:
    pages = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]
    assert len(pages) > len(PAGES)
    for path in pages:
        text = path.read_text()
        assert not from_elsewhere(text), path.name
        # The theme fetches what draws these.
        assert 'class="mermaid"' not in text, path.name


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://a.org/a.js"></script>',
        '<link rel="stylesheet" href="//a.org/a.css">',
        "@font-face{src:url(https://a.org/a.woff2)}",
        '<img alt="" src="https://a.org/a.svg">',
    ],
)
def test_what_comes_from_elsewhere_is_found(text: str) -> None:
    assert len(from_elsewhere(text)) == 1
    assert not from_elsewhere('<a href="https://a.org">a</a><script src="a.js"></script>')


def test_every_page_is_on_the_site(site: Path) -> None:
    for path in DOCS.rglob("*.md"):
        built = site / path.relative_to(DOCS).with_suffix(".html")
        assert built.exists(), path.name
    assert "What was learned" in (site / "benchmark_notes.html").read_text()
    assert "Unreleased" in (site / "changelog.html").read_text()


def test_links_between_files_are_links_between_pages() -> None:
    pytest.importorskip("mkdocs")
    links = runpy.run_path(str(DOCS / "theme" / "hooks.py"))["links"]
    there = "[a](../benchmarks/README.md#b) [c](lora.md) [d](https://e.org)"
    assert (
        links(there, source="docs/x.md", on_site="x.md") == "[a](benchmark_notes.md#b) [c](lora.md) [d](https://e.org)"
    )
    back = links("[a](../docs/lora.md)", source="benchmarks/README.md", on_site="benchmark_notes.md")
    assert back == "[a](lora.md)"
    deeper = links("[a](../lora.md) [b](serving.md)", source="docs/recipes/x.md", on_site="recipes/x.md")
    assert deeper == "[a](../lora.md) [b](serving.md)"


def test_every_wrapper_has_a_page_of_the_same_shape() -> None:
    assert set(WRAPPER_PAGES) == {name for name in WRAPPERS if hasattr(gptoss_opt, name)}
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name, file in WRAPPER_PAGES.items():
        text = (DOCS / file).read_text()
        assert text.startswith(f"# {name}\n"), file
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SHAPE, file
        example = text.split("## Example")[1].split("## What it refuses")[0]
        assert "```python\n" in example, f"{file}: its example has no code that runs"
        assert f"{name}: {file}" in navigation
        assert f"({file})" in (DOCS / "wrappers.md").read_text()


def test_the_tables_of_backends_are_what_backends_say() -> None:
    assert backends.PAGE.read_text() == backends.page(), "write it anew: python -m tests.docs.backends"


def test_asking_backends_leaves_nothing_behind() -> None:
    def here() -> list[str | None]:
        return [backends.asked(kernel)[1]("native", "cpu", torch.bfloat16) for kernel in backends.NOTES]

    before = here()
    backends.page()
    assert here() == before
    if native.why_not("cpu", torch.float32) is None:
        assert native.library().functions is not None


def test_a_backend_that_serves_less_changes_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_opt.kernels.attention.backends.Torch.why_not", lambda self, request: "no")
    assert backends.PAGE.read_text() != backends.page()


def test_the_page_of_benchmarks_is_what_results_say() -> None:
    text = (DOCS / "benchmarks.md").read_text()
    assert text == page(), "write it anew: python -m benchmarks.charts"
    for _, _, lines in measured():
        for key in ("torch", "transformers", "commit", "command", "date"):
            assert str(lines[0][key]) in text


def test_figures_of_the_readme_are_of_the_results() -> None:
    assert table() in (ROOT / "README.md").read_text(), "write it anew: python -m benchmarks.charts"
    assert len(set(table().splitlines())) > 10


def test_charts_are_of_the_results() -> None:
    pytest.importorskip("matplotlib")

    def words(svg: str) -> list[str]:
        return html.unescape(re.sub(r"<(style|defs|metadata).*?</\1>|<[^>]*>", " ", svg, flags=re.DOTALL)).split()

    folder = DOCS / "images" / "charts"
    made = measured()
    assert {path.name for path in folder.iterdir()} == {picture(chart, kind) for chart, kind, _ in made}
    for chart, kind, lines in made:
        rows = chart.rows(lines)
        shown = words((folder / picture(chart, kind)).read_text())
        # Versions of matplotlib place things otherwise; what is written must be the same.
        assert shown == words(drawn(chart, rows, title(chart, kind))), f"{chart.name}: python -m benchmarks.charts"
        other = {label: {name: 2.1 * value for name, value in values.items()} for label, values in rows.items()}
        assert shown != words(drawn(chart, other, title(chart, kind)))
        assert len(rows) * len(next(iter(rows.values()))) < len(shown)


def messages() -> Iterator[str]:
    """All strings of the package but docstrings, with a null byte in the place of what is put into them."""
    for path in (ROOT / "gptoss_opt").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in documents:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def is_printed(heading: str, printed: list[str]) -> bool:
    """Whether the fixed parts of a heading, between its dots, follow each other in one of the strings."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in heading.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in printed)


def test_headings_of_troubleshooting_are_printed_by_the_library() -> None:
    printed = list(messages())
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 25
    for heading in headings:
        assert is_printed(heading, printed), heading
        assert len(max(heading.split("..."), key=len)) > 10, f"{heading}: too little of it is fixed"
        first, *rest = heading.split(" ")
        assert not is_printed(" ".join([f"{first}?", *rest, "otherwise"]), printed)


def test_the_reference_has_every_public_name() -> None:
    pages = (gptoss_opt.__all__, "gptoss_opt", "api.md"), (extend.__all__, "gptoss_opt.extend", "api_extend.md")
    for names, module, file in pages:
        text = (DOCS / file).read_text()
        listed = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", text, re.MULTILINE)
        missing = {name for name in names if name != "__version__"} - set(listed)
        assert not missing - {"Wrapper", "STORAGES"}, f"{file}: {missing}"
        assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_that_needs_more_than_one_process_is_valid(path: Path) -> None:
    for block in blocks(path, "py"):
        for node in ast.walk(ast.parse(block, path.name)):
            if isinstance(node, ast.ImportFrom) and node.module == "gptoss_opt":
                assert {alias.name for alias in node.names} <= set(gptoss_opt.__all__)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WRAPPER_PAGES:
                wrapper = getattr(gptoss_opt, node.func.id)()
                assert {word.arg for word in node.keywords} <= {*wrapper.options(), "mesh"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_pages_exist_with_their_options(path: Path) -> None:
    from gptoss_opt.cli.app import app

    known = typer.main.get_command(app)
    for block in blocks(path, "sh") + blocks(path, ""):
        for line in block.splitlines():
            if match := re.match(r"(?:python -m gptoss_opt|gptoss-opt) (.*)", line.split("#")[0].strip()):
                words = [word for word in shlex.split(re.split(r" [<>|] ", match[1])[0]) if word]
                context = known.make_context("gptoss-opt", words[:1], resilient_parsing=True)
                name, command, _ = known.resolve_command(context, words)  # type: ignore[attr-defined]
                assert command is not None, line
                command.make_context(name, [*words[1:]], parent=context)
