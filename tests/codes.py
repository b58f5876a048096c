"""Errors are told apart by their codes, which stay when their wording is improved."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nvflare_fm.errors import FmError


@contextmanager
def refused(code: str, kind: type[FmError] = FmError) -> Iterator[pytest.ExceptionInfo[FmError]]:
    """Expect an error of this kind with this code; gives pytest's account of it."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, caught.value.message
