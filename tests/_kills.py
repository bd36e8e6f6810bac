"""Does a run survive being killed? Starts it, kills it at random moments, and starts it again."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from bdia_jax.train.metrics import read_metrics

MOMENTS = ("writing", "stepping", "starting")
"""While a checkpoint is being written, between checkpoints, and before the first step."""


@dataclasses.dataclass(frozen=True)
class Kills:
    """What became of a run that was killed."""

    kills: int
    """Times that it was killed; fewer than asked for if it came to its end before."""
    unfinished_checkpoints: int
    """Of these, how often it left a checkpoint half written."""
    resumed_at: tuple[int, ...]
    """The newest checkpoint after each kill; 0 where there was none."""


def kill_repeatedly(
    command: Sequence[str],
    folder: pathlib.Path,
    *,
    kills: int = 20,
    seed: int = 0,
    moments: Sequence[str] = MOMENTS,
    timeout: float = 300.0,
) -> Kills:
    """Runs ``command`` until it ends, killing it (SIGKILL) ``kills`` times on the way.

    What a caller has to compare is what the last process leaves behind: with that of a run
    that was never killed.

    Args:
      command: trains into ``folder``, and resumes what it finds there. It should log and save
        every few steps, and take long enough to be killed that often.
      folder: of the run.
      kills: how often.
      seed: of the moments.
      moments: kinds of moments, taken in turn; of :data:`MOMENTS`.
      timeout: seconds that one process may take.

    Raises:
      RuntimeError: if a process fails by itself, or takes too long.
    """
    draw = random.Random(seed)
    unfinished, resumed_at = 0, []
    # One more than is killed: the last one is left alone.
    for i in range(kills + 1):
        left_behind = _unfinished(folder)
        # Output goes to a file: a pipe that nobody reads would stop the process.
        with open(folder.with_name(folder.name + ".log"), "w+", encoding="utf-8") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                if i < kills:
                    reached = _reaches(moments[i % len(moments)], folder, draw)
                else:
                    reached = iter(lambda: False, None)
                deadline = time.monotonic() + timeout
                while process.poll() is None and not next(reached):
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{command} took more than {timeout} s")
                    time.sleep(0.001)
            finally:
                ended = process.poll() is not None
                if not ended:
                    process.send_signal(signal.SIGKILL)
                process.wait()
            if ended and process.returncode:
                output.seek(0)
                raise RuntimeError(
                    f"after {i} kills, {command} left with status {process.returncode}: "
                    f"{output.read()[-2000:]}"
                )
        if ended:
            break
        unfinished += bool(_unfinished(folder) - left_behind)
        done = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
        resumed_at.append(max(done, default=0))
    return Kills(len(resumed_at), unfinished, tuple(resumed_at))


def _unfinished(folder: pathlib.Path) -> set[str]:
    return {p.name for p in (folder / "checkpoints").glob("*orbax-checkpoint-tmp*")}


def _reaches(moment: str, folder: pathlib.Path, draw: random.Random) -> Iterator[bool]:
    """False until the moment has come."""
    left_behind, lines = _unfinished(folder), len(read_metrics(folder))
    began = time.monotonic()
    if moment == "writing":
        wait, come = 0.03, lambda: bool(_unfinished(folder) - left_behind)
    elif moment == "stepping":
        wait, more = 0.1, draw.randint(1, 4)
        # Fewer at first, when lines after the newest checkpoint are dropped.
        come = lambda: abs(len(read_metrics(folder)) - lines) >= more  # noqa: E731
    elif moment == "starting":
        after = draw.uniform(0, 5)
        wait, come = 0.0, lambda: time.monotonic() - began > after
    else:
        raise ValueError(f"moments are {', '.join(MOMENTS)}; got {moment!r}")
    while not come():
        yield False
    until = time.monotonic() + draw.uniform(0, wait)
    while time.monotonic() < until:
        yield False
    yield True
