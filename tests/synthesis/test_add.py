"""What a site adds: never more than its share, first to the classes with the fewest rows, and always the same."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nvflare_fm.synthesis.add import add

counts = st.dictionaries(st.sampled_from("abc"), st.integers(0, 20), max_size=3)
labels = st.lists(st.sampled_from(["a", "b", "c", "d", None]), max_size=30)
shares = st.floats(0, 0.9)


@given(counts, labels, shares)
def test_no_more_is_added_than_the_share(own, offered, share):
    added = add(own, offered, share)
    rows = sum(own.values())
    assert sorted(set(added)) == added
    assert len(added) <= share * (rows + len(added)) + 1e-9
    if len(added) < len(offered):
        assert len(added) + 1 > share * (rows + len(added) + 1) - 1e-9  # one more would be too many


@given(counts, labels, shares)
def test_a_class_gets_none_while_another_has_fewer_rows_and_a_candidate_left(own, offered, share):
    added = Counter(offered[place] for place in add(own, offered, share))
    after = {label: own.get(label, 0) + added[label] for label in {*offered}}
    waiting = {label for label in after if added[label] < offered.count(label)}
    for label in after:
        if added[label]:
            assert all(after[other] >= after[label] - 1 for other in waiting)


@given(counts, labels, shares, st.integers(0, 99))
def test_of_a_class_the_first_are_added_from_where_a_site_begins(own, offered, share, turn):
    added = add(own, offered, share, turn)
    assert len(added) == len(add(own, offered, share))
    for label in {*offered}:
        places = [place for place, other in enumerate(offered) if other == label]
        start = turn % len(places)
        places = places[start:] + places[:start]
        mine = [place for place in added if offered[place] == label]
        assert mine == sorted(places[: len(mine)])


@given(counts, labels)
def test_a_share_of_nothing_adds_nothing(own, offered):
    assert add(own, offered, 0.0) == []
    assert add({}, offered, 0.5) == []
