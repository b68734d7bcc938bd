"""How a case is measured: interleaved contenders, a control around every sample, memory in a pass of its own.

Each repetition runs every contender once, in rotating order, in one process. A copy of 16 MiB by all cores, the
control, runs before and after each sample: where it took more than 20 % longer than usual in this case, something else
used the machine and the sample is flagged; flagged samples count only where most of a contender's samples are flagged.

Between samples all free memory goes back to the system, so that "fresh" memory is fresh for those too who take it from
an allocator that would rather use it again.

Wall time is `perf_counter`, CPU time that of all threads of the process. Peak memory is *anonymous* memory above the
start, sampled by another process (so that a contender that holds the GIL cannot hide), after all times were taken.
"""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tests.benchmarks import frozen_heap

Kind = Literal["ours", "limit", "peer", "part"]

MOVED = 1.2  # a control that took this much longer than usual flags its neighbors
CONTROL = 16 << 20
LARGE = 100 << 20  # in cases below this a collection of garbage would outweigh what is measured


class Unavailable(Exception):
    """Why a contender cannot run here; its row says so."""


@dataclass(frozen=True)
class Timing:
    """Seconds that another process measured of itself; a contender returns it instead of being timed here."""

    wall: float
    cpu: float


@dataclass
class Contender:
    """One way to do what a case asks for.

    Attributes:
        name: unique in its case.
        kind: "ours", a "limit" of the machine, a "peer", or "part" (shown apart, or subtracted from another).
        make: builds what is timed; imports of optional packages belong here. May raise `Unavailable`.
        prepare: makes the argument of each run, untimed.
        checked: whether the case's `verify` looks at the result.
        once: measured once only, where repeating would cost more than it tells.
        memory: whether its memory is this process's, so that it can be seen.
        nbytes: bytes moved, where they are not the case's.
    """

    name: str
    kind: Kind
    make: Callable[[], Callable[[Any], Any]]
    prepare: Callable[[], Any] = lambda: None
    checked: bool = True
    once: bool = False
    memory: bool = True
    nbytes: int | None = None


@dataclass
class Case:
    """What is compared.

    Attributes:
        name: as `--case` takes it.
        title: one line.
        nbytes: bytes that a contender moves, for GB/s.
        count: tensors, for times per tensor; None where that says nothing.
        contenders: in the order of the report.
        verify: raises where a result is wrong; runs once per contender, before anything is timed.
        around: what holds while the case is measured, for example other load.
        settle: runs after every sample, untimed; for example removes what was written.
        steady: whether the control can be trusted; not under load that the harness itself makes.
    """

    name: str
    title: str
    nbytes: int
    contenders: list[Contender]
    count: int | None = None
    verify: Callable[[Any], None] = lambda result: None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    settle: Callable[[], None] = lambda: None
    steady: bool = True


@dataclass
class Sample:
    """One run of one contender, in seconds; `control` is the slower of its two controls."""

    wall: float
    cpu: float
    control: float
    flagged: bool = False


@dataclass
class Result:
    """What was measured of one contender; `reason` says why there is nothing."""

    name: str
    kind: Kind
    nbytes: int
    samples: list[Sample] = field(default_factory=list)
    peak: int | None = None
    reason: str | None = None

    def counted(self) -> list[Sample]:
        quiet = [sample for sample in self.samples if not sample.flagged]
        return quiet if 2 * len(quiet) >= len(self.samples) else self.samples

    def noisy(self) -> bool:
        return len(self.counted()) == len(self.samples) and any(sample.flagged for sample in self.samples)

    def wall(self, of: str = "min") -> float:
        walls = [sample.wall for sample in self.counted()]
        return min(walls) if of == "min" else statistics.median(walls)

    def cpu(self) -> float:
        return min(sample.cpu for sample in self.counted())


class Control:
    """The copy, by all cores, that tells whether the machine is as quiet as before."""

    def __init__(self) -> None:
        self._threads = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads)
        self._source, self._target = (np.ones(CONTROL, np.uint8) for _ in range(2))

    def __call__(self) -> float:
        start = time.perf_counter()
        list(self._pool.map(self._copy, range(self._threads)))
        return time.perf_counter() - start

    def _copy(self, share: int) -> None:
        span = slice(CONTROL * share // self._threads, CONTROL * (share + 1) // self._threads)
        np.copyto(self._target[span], self._source[span])


_SAMPLER = """
import select, sys
path = "/proc/%s/status" % sys.argv[1]
def anonymous():
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
while sys.stdin.readline():
    before = highest = anonymous()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.0005)[0]:
        highest = max(highest, anonymous())
    sys.stdin.readline()
    print(max(highest, anonymous()) - before, flush=True)
"""


def _trimmer() -> Callable[[int], Any]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return lambda keep: None


_TRIM = _trimmer()


def trim() -> None:
    """Give back all memory that nobody uses. What the allocator kept would be neither fresh nor seen to be taken."""
    gc.collect()
    _TRIM(0)


class Sampler:
    """Another process that watches the anonymous memory of this one; idle except between `start` and `stop`."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-E", "-c", _SAMPLER, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def peak(self, act: Callable[[], Any]) -> int:
        """Highest anonymous memory while `act` runs and its result lives, in bytes above the start."""
        trim()
        self._say()
        try:
            result = act()
        finally:
            peak = int(self._say())
        del result
        return peak

    def _say(self) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run(case: Case, reps: int, sampler: Sampler, control: Control) -> list[Result]:
    """Measure every contender of a case: once to see that it works, `reps` times in turns, once for its memory."""
    results = [Result(c.name, c.kind, c.nbytes or case.nbytes) for c in case.contenders]
    pairs = list(zip(case.contenders, results, strict=True))
    small = case.nbytes <= LARGE
    with frozen_heap() if small else nullcontext():
        acts = {c.name: act for c, r in pairs if (act := _working(case, c, r))}
        if small:
            gc.freeze()  # what the contenders imported
        able = [(c, r) for c, r in pairs if c.name in acts]
        with case.around():
            for repetition in range(reps):
                turn = repetition % len(able) if able else 0
                for contender, result in able[turn:] + able[:turn]:
                    if not (contender.once and result.samples):
                        _sample(case, contender, result, acts[contender.name], control)
        for contender, result in able:
            _guarded(case, result, lambda c=contender, r=result: _memory(c, r, acts[c.name], sampler))
    if case.steady:
        _flag(results)
    return results


def _working(case: Case, contender: Contender, result: Result) -> Callable[[Any], Any] | None:
    """What is timed, after a run that shows that it works; None, and a reason, where it does not."""

    def attempt() -> Callable[[Any], Any]:
        act = contender.make()
        found = act(contender.prepare())
        if contender.checked:
            case.verify(found)
        return act

    return _guarded(case, result, attempt)


def _guarded(case: Case, result: Result, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a contender that fails is a row with the reason; DCP's error is no Exception
        first = next(iter(str(error).splitlines()), "")
        result.reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {first[:200]}"
        result.samples = []
        return None
    finally:
        _settle(case)


def _sample(case: Case, contender: Contender, result: Result, act: Callable[[Any], Any], control: Control) -> None:
    def attempt() -> None:
        given = contender.prepare()
        before = control()
        wall, cpu = time.perf_counter(), time.process_time()
        found = act(given)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        slower = max(before, control())
        if isinstance(found, Timing):
            wall, cpu = found.wall, found.cpu
        result.samples.append(Sample(wall, cpu, slower))

    if result.reason is None:
        _guarded(case, result, attempt)


def _memory(contender: Contender, result: Result, act: Callable[[Any], Any], sampler: Sampler) -> None:
    if contender.memory and result.reason is None:
        given = contender.prepare()
        result.peak = sampler.peak(lambda: act(given))


def _settle(case: Case) -> None:
    case.settle()
    trim()


def _flag(results: Sequence[Result]) -> None:
    controls = [sample.control for result in results for sample in result.samples]
    if controls:
        usual = statistics.median(controls)
        for result in results:
            for sample in result.samples:
                sample.flagged = sample.control > MOVED * usual


_BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(100000): pass\n"


@contextmanager
def busy(processes: int | None = None) -> Iterator[None]:
    """Other programs that occupy the cores; as many as there are cores, unless told."""
    command = [sys.executable, "-S", "-E", "-c", _BUSY, str(os.getpid())]
    running = [subprocess.Popen(command) for _ in range(processes or os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def warm(nbytes: int) -> None:
    """Touch as much memory as a run will use: the first touch ever of a page of a virtual machine is far dearer."""
    step = 256 << 20
    held = [np.ones(min(step, nbytes - start), np.uint8) for start in range(0, nbytes, step)]
    del held
