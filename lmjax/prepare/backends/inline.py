"""This process, one task after another: for notebooks, tests and debuggers."""

from __future__ import annotations

from collections.abc import Sequence

from lmjax.prepare.tasks import Done, Task


class Inline:
    """Runs tasks where it stands."""

    def map(self, tasks: Sequence[Task]) -> list[Done]:
        """Runs them in turn."""
        return [task.run() for task in tasks]
