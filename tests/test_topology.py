"""Laws of topologies: what is read, by whom, and what follows from it."""

from math import floor, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsenet.architecture import Architecture
from sparsenet.topology import (
    FETCH_SYNTAX,
    FETCHES,
    Topology,
    dense,
    family_name,
    harmonic,
    named_fetch,
    sparse,
    windowed,
)

NAMES = [*FETCHES, "sparse:3", "sparse:7", "windowed:1", "windowed:9"]


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


def path_length(topology, choose):
    """Links from the stage input to its output: the fewest with ``min``, the most with ``max``."""
    lengths = [0]
    for read in topology.sources:
        lengths.append(1 + choose(lengths[j] for j in read))
    return lengths[-1]


@given(st.integers(1, 200))
def test_paths(depth):
    assert path_length(Topology.of(dense(), depth), min) == 1
    assert path_length(Topology.of(windowed(1), depth), min) == depth + 1
    topology = Topology.of(sparse(), depth)
    assert path_length(topology, max) == depth + 1
    assert path_length(topology, min) == (depth + 1).bit_count()  # a link for each binary digit


@pytest.mark.parametrize("name", NAMES)
def test_the_last_reader_reads_and_nobody_reads_later(name):
    topology = Topology.of(named_fetch(name), 40)
    for j, last in enumerate(topology.last_reader):
        assert j in topology.sources[last - 1]
        assert not any(j in read for read in topology.sources[last:])
    for j, first in enumerate(topology.first_reader):
        assert j in topology.sources[first - 1]
        assert not any(j in read for read in topology.sources[: first - 1])


def test_a_layer_that_only_an_unused_layer_reads_is_unused():
    topology = Topology.of(lambda i: [max(i - 2, 0)], 4)
    assert topology.last_reader[2] == 4 and topology.last_reader[4] == 0
    assert topology.used == {0, 1, 3}
    for name in NAMES:
        assert Topology.of(named_fetch(name), 40).used == set(range(41))


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (((0,), (1, 2), (0,)), ["layer 2", "feature 2", "0 to 1"]),
        (((0,), (-1,), (0,)), ["layer 2", "feature -1"]),
        (((0,), (0, 1, 0), (0,)), ["layer 2", "twice"]),
        (((0,), (), (0,)), ["layer 2", "reads nothing"]),
        (((0,), (1,), (3,)), ["the stage output", "feature 3"]),
        (((0,), (True,), (2,)), ["layer 2", "feature True", "0 to 1"]),
    ],
)
def test_a_wrong_topology_names_the_layer(sources, words):
    with pytest.raises(ValueError) as error:
        Topology(sources)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "fetch",
    [
        np.arange,
        lambda i: [np.int64(j) for j in range(i)],
        [np.arange(i) for i in range(1, 4)],
        [[np.int32(j) for j in range(i)] for i in range(1, 4)],
    ],
)
def test_features_may_be_numpys_numbers(fetch):
    architecture = Architecture(fetch=fetch, blocks=(2, 2), growth_rate=4)
    assert architecture.fetch == ((0,), (0, 1), (0, 1, 2))
    assert {type(j) for read in architecture.fetch for j in read} == {int}


@pytest.mark.parametrize("name", ["spars", "dense:2", "sparse:x", "sparse:1", "windowed:0", ""])
def test_a_wrong_name_says_what_is_expected(name):
    with pytest.raises(ValueError, match="fetch"):
        named_fetch(name)


@pytest.mark.parametrize("name", FETCHES)
def test_the_table_of_fetches_says_how_a_topology_is_asked_for(name):
    argument = FETCHES[name].argument
    syntax = f"{name}[:{argument}]" if argument else name
    assert syntax in FETCH_SYNTAX.replace(" or ", ", ").split(", ")
    assert FETCH_SYNTAX in Architecture.__dataclass_fields__["fetch"].metadata["help"]
    with pytest.raises(ValueError, match=f"did you mean {name}") as error:
        named_fetch(name + "e")
    assert FETCH_SYNTAX in str(error.value)
    if argument:
        assert callable(named_fetch(f"{name}:3"))
    else:
        with pytest.raises(ValueError, match="fetch: expected"):
            named_fetch(f"{name}:3")


@pytest.mark.parametrize(
    ("fetch", "name"),
    [
        ("sparse", "SparseNet"),
        ("sparse:3", "SparseNet (sparse:3)"),
        ("dense", "DenseNet"),
        ("harmonic", "HarDNet"),
        ("windowed", "SparseNet (windowed)"),
        ([[0], [1]], "SparseNet (own topology)"),
    ],
)
def test_the_names_of_networks_in_tables(fetch, name):
    assert family_name(fetch) == name
