"""A trainer that wants more memory than its site gives fails alone, in a way that `memory.ran_out` knows."""

import subprocess
import sys

import pytest

TRIAL = """
import torch
from nvflare_fm.site.offer.confine import confine
from nvflare_fm.site.training.memory import ran_out

confine({memory_gib}, processes={processes})
try:
    torch.ones(2**28, device="cuda" if torch.cuda.is_available() else "cpu")  # 1 GiB
    print("there was room")
except RuntimeError as error:
    print("there was none" if ran_out(error) else error)
"""


@pytest.mark.parametrize(("memory_gib", "processes", "said"), [(4, 1, "there was room"), (4, 4, "there was none")])
def test_a_trainer_gets_the_memory_its_site_gives_and_no_more(memory_gib: int, processes: int, said: str):
    trial = TRIAL.format(memory_gib=memory_gib, processes=processes)
    done = subprocess.run([sys.executable, "-c", trial], capture_output=True, text=True)
    assert said in done.stdout, done.stderr
