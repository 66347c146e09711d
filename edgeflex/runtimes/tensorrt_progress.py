"""How far TensorRT's builder is, as a share that only rises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeflex.progress import Advance

# Of the progress of one engine
STEPS = 100


class Phases:
    """How far a build is, from the nested phases that TensorRT reports. Never falls."""

    def __init__(self) -> None:
        self._active: dict[str, tuple[str | None, int]] = {}
        self._done: dict[str, int] = {}
        self._most = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase with ``steps`` begins, inside a step of ``parent`` or as the outermost."""
        self._active[name] = (parent, max(steps, 1))
        self._done[name] = 0

    def step(self, name: str, step: int) -> None:
        """Step ``step``, counted from 0, of a phase is done."""
        self._done[name] = step + 1

    def finish(self, name: str) -> None:
        """A phase ends, its steps done or skipped."""
        self._active.pop(name, None)

    def share(self) -> float:
        """Return the share that is done, 0 to 1."""
        outermost = [self._share(name) for name, (parent, _) in self._active.items() if parent is None]
        self._most = max([self._most, *outermost])
        return self._most

    def _share(self, name: str) -> float:
        inner = sum(self._share(child) for child, (parent, _) in self._active.items() if parent == name)
        return min(1.0, (self._done[name] + min(inner, 1.0)) / self._active[name][1])


def progress_monitor(trt: Any, advance: Advance) -> Any:
    """Return a monitor for TensorRT's builder that moves ``advance`` towards ``STEPS``; Ctrl-C stops the build."""

    class Monitor(trt.IProgressMonitor):
        """Never lets an exception into TensorRT; what was raised is kept in ``interruption``."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interruption: BaseException | None = None
            self.phases = Phases()
            self.told = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.hear(lambda: self.phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.hear(lambda: self.phases.step(phase_name, step))
            return self.interruption is None

        def phase_finish(self, phase_name: str) -> None:
            self.hear(lambda: self.phases.finish(phase_name))

        def hear(self, change: Callable[[], None]) -> None:
            try:
                change()
                now = int(self.phases.share() * STEPS)
                if now > self.told:
                    advance(now - self.told)
                    self.told = now
            except BaseException as error:  # noqa: BLE001 - the caller is C++, and Ctrl-C may arrive just here
                self.interruption = error

    return Monitor()
