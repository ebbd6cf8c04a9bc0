"""A job in which nothing moves says who is where, and ends.

Each rank notes what it is doing (``Watchdog.note``). A thread looks at the notes: when the newest
is older than the time-out, the rank is stuck. It then writes where it stands into a file of the
run's folder, waits a little for the others', and ends the process. The lowest rank that can still
speak prints them all: which ranks wait in which operation, and which gave no sign (stopped, frozen,
gone). The others end after it, since the operations that wait for a rank fail when it goes, and
their errors would come before the report. Nothing is written while the job moves, and no message
needs the network that may be stuck.

Where a rank stands is read from its Python stacks: the innermost call into torch.distributed is the
operation, the innermost frame of this package the place. On a GPU collectives run behind the host,
which then waits where it wants their result.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_STATUS = 2
REPORT = "report.txt"
GRACE_S = 5.0  # ranks notice within the time a step takes of each other
_WAITS = ("torch/distributed/", "deepspeed/comm/")
# (torch's operators leave no frame: the function that waits in one stands for it.)
_WAITS_HERE = {"finish_sum": "all_reduce", "finish_scatter": "reduce_scatter"}


@dataclass(frozen=True)
class Standing:
    """Where a rank is. ``phase``: the last part of the step that it finished; ``operation``: the
    call into torch.distributed it waits in, or "" when it is in none; ``place``: file and function
    of this package; ``seconds``: since that part was finished."""

    rank: int
    step: int
    phase: str
    operation: str
    place: str
    seconds: float


@dataclass(frozen=True)
class _Note:
    """The last sign of this rank: at a time of the monotonic clock, and how long it may last."""

    step: int
    phase: str
    at: float
    limit_s: float


class Watchdog:
    """Watches this rank. ``end`` is called when the report is out; it does not return."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        grace_s: float = GRACE_S,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._timeout, self._grace, self._end = timeout_s, grace_s, end
        # One value, replaced whole: the watching thread never sees half a note.
        self._noted = _Note(0, "the start", time.monotonic(), timeout_s)
        self._stop, self._reporting = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Nothing is watched with a time-out of 0."""
        if self._timeout > 0:
            for file in (_report_file(self._folder, self._rank), self._folder / "hang" / REPORT):
                file.unlink(missing_ok=True)
            self._thread.start()

    def note(self, phase: str, step: int | None = None, *, limit_s: float = 0.0) -> None:
        """This rank goes on: ``phase`` is done. ``step``: the one that begins (None: the same).
        ``limit_s``: the time-out until the next note, where it is above the ordinary one."""
        step = self._noted.step if step is None else step
        self._noted = _Note(step, phase, time.monotonic(), max(self._timeout, limit_s))

    def stop(self) -> None:
        """End watching; the run is over. Does not return while this rank is reporting a hang: what
        ended the run is then that another rank has left."""
        self._stop.set()
        if self._reporting.is_set():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(max(0.05, min(1.0, self._timeout / 10))):
            noted = self._noted
            if time.monotonic() - noted.at > noted.limit_s:
                self._reporting.set()
                self._report(noted)
                return

    def _report(self, noted: _Note) -> None:
        mine = self._standing(noted)
        deadline = time.monotonic() + self._grace
        try:
            _publish(_report_file(self._folder, self._rank), json.dumps(asdict(mine)))
            found = self._gather(deadline)
        except OSError:
            found = {self._rank: mine}  # the folder is out of reach, too: speak for oneself
        if not found or min(found) == self._rank:
            report = describe(found, self._world_size, noted.limit_s, self._setting(noted))
            sys.stderr.write(report)
            sys.stderr.flush()
            with contextlib.suppress(OSError):  # it only lets the others end before their grace
                _publish(self._folder / "hang" / REPORT, report)
        else:
            self._await_report(deadline + self._grace)
        self._end(EXIT_STATUS)

    def _setting(self, noted: _Note) -> str:
        saves = noted.limit_s > self._timeout
        return "run.save_timeout_s" if saves else "run.hang_timeout_s"

    def _await_report(self, deadline: float) -> None:
        file = self._folder / "hang" / REPORT
        while time.monotonic() < deadline and not _is_recent(file, self._timeout + self._grace):
            time.sleep(0.05)

    def _gather(self, deadline: float) -> dict[int, Standing]:
        """Every rank's standing, waiting for those still to come."""
        while True:
            found = read_standings(self._folder, self._timeout + self._grace)
            if len(found) >= self._world_size or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def _standing(self, noted: _Note) -> Standing:
        operation, place = waiting_in(sys._current_frames())
        seconds = time.monotonic() - noted.at
        return Standing(self._rank, noted.step, noted.phase, operation, place, seconds)


def waiting_in(stacks: Mapping[int, FrameType]) -> tuple[str, str]:
    """(operation, place) of the thread that waits in torch.distributed, else of the main one."""
    main = threading.main_thread().ident
    ordered = sorted(stacks, key=lambda ident: ident != main)
    found = [_innermost(stacks[ident]) for ident in ordered]
    in_operation = [both for both in found if all(both)]
    return (in_operation or found)[0]


def _innermost(stack: FrameType) -> tuple[str, str]:
    operation = place = ""
    frame: FrameType | None = stack
    while frame is not None and not place:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        name = frame.f_code.co_name
        if any(part in file for part in _WAITS) and name not in ("wrapper", "wait"):
            operation = name  # the outermost of the library's frames is the one that was called
        elif file.endswith("/fastllm_train/collectives.py") and name in _WAITS_HERE:
            operation = _WAITS_HERE[name]
        elif "/fastllm_train/" in file and not file.endswith("/watchdog.py"):
            place = f"{file.partition('/fastllm_train/')[2]}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return operation, place


def read_standings(folder: Path, newer_than_s: float) -> dict[int, Standing]:
    """What ranks have written in the last ``newer_than_s`` seconds (an earlier hang's do not
    count)."""
    found: dict[int, Standing] = {}
    for file in (folder / "hang").glob("rank-*.json"):
        try:
            if _is_recent(file, newer_than_s):
                values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                found[int(values["rank"])] = Standing(**values)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # removed or overwritten at this moment
    return found


def describe(
    found: Mapping[int, Standing],
    world_size: int,
    timeout_s: float,
    setting: str = "run.hang_timeout_s",
) -> str:
    """The report: an error line, one line a rank that spoke, a line of those that did not, a
    hint, which names the ``setting`` that the time-out is from."""
    silent = [rank for rank in range(world_size) if rank not in found]
    busy = [s.rank for s in found.values() if not s.operation]
    waited = sorted({s.operation for s in found.values() if s.operation})
    what = f"in {', '.join(waited)}" if waited else "and no rank is in a collective operation"
    lines = [f"error: nothing moved for {timeout_s:g} s {what}"]
    for rank in sorted(found):
        s = found[rank]
        doing = f"waits in {s.operation}" if s.operation else "is in no collective operation"
        lines.append(f"  rank {rank}: step {s.step}, after {s.phase}: {doing} ({s.place})")
    if silent:
        names = ", ".join(str(rank) for rank in silent)
        lines.append(f"  rank {names}: no sign (stopped, frozen, or gone)")
    suspects = silent or busy
    if suspects:
        names = ", ".join(str(rank) for rank in suspects)
        hint = f"look at the machine of rank {names}: the others wait for it"
    else:
        hint = "all ranks wait, in different operations or on the network between them"
    last = "the last checkpoint is intact: run again"
    return "\n".join([*lines, f"hint: {hint}; {last}, or raise {setting}"]) + "\n"


def _publish(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _is_recent(file: Path, newer_than_s: float) -> bool:
    try:
        return time.time() - file.stat().st_mtime <= newer_than_s
    except FileNotFoundError:
        return False


def _report_file(folder: Path, rank: int) -> Path:
    return folder / "hang" / f"rank-{rank:05d}.json"
