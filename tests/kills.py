"""A process that is killed at a line of its own choosing: what it leaves is looked at by who forked it."""

import os
import sys
from collections.abc import Callable
from typing import Any


def ends(work: Callable[[], Any], line: int, *files: str) -> bool:
    """Whether `work` ends in a child that is killed as it comes to this line, counted over what runs of these files."""
    if not (child := os.fork()):
        seen = -1

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal seen
            if not frame.f_code.co_filename.endswith(files):
                return None
            seen += event == "line"
            if seen == line:
                os._exit(9)
            return trace

        sys.settrace(trace)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
