"""The pictures of the docs, made by the commands that the pages show: `python docs/pictures.py`.

Commands run in a pseudo-terminal, as a person sees them, and what they write there is drawn by rich.
"""

from __future__ import annotations

import io
import os
import pty
import runpy
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gptoss_opt.testing import random_checkpoint

HERE = Path(__file__).parent
IMAGES = HERE / "images"
WIDTH = 96
COMMANDS = {
    "plan": "gptoss-opt plan 20b --hardware 2x24GB",
    "verify": "gptoss-opt verify path/to/checkpoint --gradients",
    "bench": "gptoss-opt bench path/to/checkpoint",
    "doctor": "gptoss-opt doctor",
}
"""What each picture shows."""

# As rich draws it, without a font from elsewhere.
FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
    <style>
    .{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
        font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
    {styles}
    </style>
    <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
    </defs>
    {chrome}
    <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
    </g>
</svg>
"""


def seen(command: list[str], folder: Path) -> str:
    """What a person sees of a command in a terminal, with colours."""
    read, write = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=write, stderr=subprocess.DEVNULL, env=environment, cwd=folder):
        os.close(write)
        found = b""
        with suppress(OSError):  # which says that the other end is closed
            while True:
                found += os.read(read, 1 << 16)
    os.close(read)
    return found.decode().replace("\r\n", "\n")


def drawn(name: str, folder: Path) -> str:
    """The picture of a command, whose checkpoint is in the folder."""
    command = COMMANDS[name]
    text = seen([sys.executable, "-m", "gptoss_opt", *command.split()[1:]], folder)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold"), command))
    console.print(Text.from_ansi(text))
    return console.export_svg(title=command.split()[0], code_format=FORMAT, unique_id=f"picture-{name}")


def main() -> None:
    """Draw all of them, or those that are named."""
    IMAGES.mkdir(exist_ok=True)
    names = sys.argv[1:] or [*COMMANDS, "monitor"]
    with tempfile.TemporaryDirectory() as scratch:
        random_checkpoint(Path(scratch, "path/to/checkpoint"), "small")
        for name in names:
            if name in COMMANDS:
                (IMAGES / f"{name}.svg").write_text(drawn(name, Path(scratch)))
    if "monitor" in names:
        sys.argv[1:] = [str(IMAGES / "monitor.svg")]
        runpy.run_path(str(HERE / "examples" / "monitoring.py"))


if __name__ == "__main__":
    main()
