"""Guards on whatever changes admission lets through: they judge, or refuse by code, and every weight is one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.adapter import Adapter
from nvflare_fm.aggregation import guard
from nvflare_fm.aggregation.cohort import Cohort
from nvflare_fm.errors import FmError
from tests.strategies import update

NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 1e9, -1e9, 1e-30, -1e-45, 3.0]) | st.floats(-1e9, 1e9, width=32)
ROWS = st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=1, max_size=9)
SETTINGS = st.fixed_dictionaries(
    {"rule": st.sampled_from(["geometric_median", "centered_clip", "multi_krum"])},
    optional={
        "f": st.integers(-1, 5),
        "mix": st.sampled_from(["none", "nnm", "bucketing", "x"]),
        "near": st.floats(-1, 5),
        "radius": st.floats(-1, 5),
    },
)


@given(rows=ROWS, asked=SETTINGS)
def test_every_weight_is_a_share_and_one_of_them_is_whole(rows: list[list[float]], asked: dict[str, object]) -> None:
    sites = [update(f"s{i}", Adapter({}, {"head": torch.tensor(row)})) for i, row in enumerate(rows)]
    try:
        verdicts = guard.judge([asked], Cohort(sites, Adapter(), "tail"))
    except FmError as error:
        if error.code not in {"too_few_for_guard", "wrong_setting"}:
            raise
        return
    weights = [verdicts[site.site].weight if site.site in verdicts else 1.0 for site in sites]
    assert all(0 <= weight <= 1 for weight in weights)
    assert max(weights) == 1
    assert all(verdict.reason for verdict in verdicts.values() if verdict.left_out)
