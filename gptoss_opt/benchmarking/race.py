"""The race of two contenders, each in a process of its own: they take turns, once ours was verified."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..apart import Apart, ProcessDied, out_of_memory
from ..planner import Device
from ..verification import Verification
from .contender import Contender
from .limits import measured_again
from .report import OURS, PEER, Agreement, Measured

BAR = "{desc:<32}{bar}| {n_fmt}/{total_fmt} {elapsed}"
BUFFER = 64 << 20
"""How many bytes of a file are read at once."""


class Runner:
    """A contender while it is measured.

    Attributes:
        name: of the contender.
        measured: what was measured so far, or why it is not.
    """

    def __init__(self, name: str, contender: Contender, absent: str | None = None) -> None:
        self.name = name
        self.measured = Measured(contender.prompt, absent=absent)
        self._process = Apart(_held, contender, quiet=True)

    def ask(self, question: Callable[[Contender], Any]) -> Any:
        """The answer; None of one that is not measured, or whose memory runs out, which is said from then on."""
        if self.measured.absent:
            return None
        try:
            return self._process.ask(question)
        except (ProcessDied, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ProcessDied) or out_of_memory(error)):
                raise
            why = str(error) if isinstance(error, ProcessDied) else "ran out of memory"
        self.close()  # its memory is for the other one
        self.measured = replace(self.measured, absent=why)
        return None

    def begin(self, folder: Path) -> None:
        """Load the model, after its files were read: all load from the system's cache, as far as that holds them."""
        if self.measured.absent is None:
            _read(folder)
        self.measured = replace(self.measured, loaded=self.ask(Contender.begin))

    def turn(self) -> None:
        """Decode once."""
        if turn := self.ask(Contender.turn):
            self.measured = replace(self.measured, turns=(*self.measured.turns, turn))

    def close(self) -> None:
        """End the process."""
        self._process.close()


def _held(contender: Contender) -> Contender:
    """What a process makes of what it was sent: it is all there, and loads its model when it is asked to begin."""
    return contender


def _read(folder: Path) -> None:
    buffer = bytearray(BUFFER)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


@dataclass(frozen=True)
class Raced:
    """What a race found beside what the runners know.

    Attributes:
        device: with the best of the rates that were measured before each turn.
        verification: our model beside plain computations; None if it was never there.
        agreement: our logits beside transformers'; None if one of both was never there.
    """

    device: Device
    verification: Verification | None = None
    agreement: Agreement | None = None


def race(ours: Runner, theirs: Runner, folder: Path, repeats: int, device: Device) -> Raced:
    """Let both load and take their turns, if ours is found to be right; the runners know what was measured.

    Args:
        ours, theirs: the contenders. If theirs is absent from the beginning, it starts no process.
        folder: of the checkpoint.
        repeats: how many turns each takes.
        device: that they run on.
    """
    both = [one for one in (ours, theirs) if one.measured.absent is None]
    steps = len(both) * (1 + repeats) + 2
    with ExitStack() as stack, tqdm(total=steps, bar_format=BAR) as bar:

        def step(what: str, run: Callable[[], Any]) -> Any:
            bar.set_description_str(what)
            found = run()
            bar.update()
            return found

        for one in both:
            stack.enter_context(closing(one))
            step(f"{one.name}: load", partial(one.begin, folder))
            if ours.measured.absent:
                return Raced(device)
        verification = step(f"{OURS}: verify every part", partial(ours.ask, Contender.verification))
        agreement = step(f"{OURS} beside {PEER}: logits", partial(_agreement, ours, theirs))
        if verification and verification.right and (agreement is None or agreement.right):
            for number in range(repeats):
                device = measured_again(device)
                for one in both:
                    step(f"{one.name}: turn {number + 1}", one.turn)
    return Raced(device, verification, agreement)


def _agreement(ours: Runner, theirs: Runner) -> Agreement | None:
    """Our logits beside transformers'. Half of what other tokens change is allowed: a router's ties fall otherwise."""
    timed, other = partial(Contender.logits, shift=0), partial(Contender.logits, shift=1)
    found, expected, far = ours.ask(timed), theirs.ask(timed), theirs.ask(other)
    if found is None or expected is None or far is None:
        return None
    size = expected.norm()
    return Agreement(float((found - expected).norm() / size), float((far - expected).norm() / size) / 2)
