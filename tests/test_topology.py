"""Laws of topologies: what is read, by whom, and what follows from it."""

from math import floor, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsenet.topology import Topology, dense, harmonic, named_fetch, sparse, windowed

NAMES = [
    "sparse",
    "sparse:3",
    "sparse:7",
    "dense",
    "harmonic",
    "windowed",
    "windowed:1",
    "windowed:9",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 2, 7, 33, 200])
def test_every_layer_reads_earlier_features_once_and_the_one_before_it(name, depth):
    topology = Topology.of(named_fetch(name), depth)
    assert topology.depth == depth
    for i, read in enumerate(topology.sources, start=1):
        assert len(set(read)) == len(read) >= 1
        assert all(0 <= j < i for j in read)
        assert i - 1 in read
    assert min(topology.last_reader) > 0  # so nothing is made for nobody


@given(st.integers(2, 9), st.integers(1, 3000))
def test_sparse_reads_powers_of_the_base_newest_first(base, i):
    read = sparse(base)(i)
    assert [i - j for j in read] == [base**k for k in range(len(read))]
    assert i - base ** len(read) < 0  # it stops only where nothing is left
    assert len(read) <= 1 + floor(log(i, base) + 1e-9)


def test_the_papers_example():
    # arXiv:1801.05895, section 3: layer l reads l-1, l-2, l-4, l-8, ...
    assert list(sparse()(9)) == [8, 7, 5, 1]
    assert list(sparse()(8)) == [7, 6, 4, 0]


@given(st.integers(1, 4096))
def test_harmonic_links_are_powers_of_two_that_divide(k):
    steps = [k - j for j in harmonic()(k)]
    assert all(step & (step - 1) == 0 and k % step == 0 for step in steps)
    assert max(steps) == k & -k


@given(st.integers(1, 300))
def test_dense_has_every_link_and_windowed_the_newest(depth):
    assert Topology.of(dense(), depth).edges == (depth + 1) * (depth + 2) // 2
    assert list(windowed(4)(depth)) == list(dense()(depth))[::-1][:4]


@given(st.integers(1, 200))
def test_paths(depth):
    assert Topology.of(dense(), depth).shortest_path == 1
    assert Topology.of(windowed(1), depth).shortest_path == depth + 1
    sparse_topology = Topology.of(sparse(), depth)
    assert sparse_topology.longest_path == depth + 1
    assert sparse_topology.shortest_path == bin(depth + 1).count(
        "1"
    )  # one link for each binary digit


@pytest.mark.parametrize("name", NAMES)
def test_the_last_reader_reads_and_nobody_reads_later(name):
    topology = Topology.of(named_fetch(name), 40)
    for j, last in enumerate(topology.last_reader):
        assert j in topology.sources[last - 1]
        assert not any(j in read for read in topology.sources[last:])
    for j, first in enumerate(topology.first_reader):
        assert j in topology.sources[first - 1]
        assert not any(j in read for read in topology.sources[: first - 1])


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (((0,), (1, 2), (0,)), ["layer 2", "feature 2", "0 to 1"]),
        (((0,), (-1,), (0,)), ["layer 2", "feature -1"]),
        (((0,), (0, 1, 0), (0,)), ["layer 2", "twice"]),
        (((0,), (), (0,)), ["layer 2", "reads nothing"]),
        (((0,), (1,), (3,)), ["the stage output", "feature 3"]),
    ],
)
def test_a_wrong_topology_names_the_layer(sources, words):
    with pytest.raises(ValueError) as error:
        Topology(sources)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["spars", "dense:2", "sparse:x", "sparse:1", "windowed:0", ""])
def test_a_wrong_name_says_what_is_expected(name):
    with pytest.raises(ValueError, match="fetch"):
        named_fetch(name)
