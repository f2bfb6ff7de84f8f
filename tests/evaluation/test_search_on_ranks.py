"""The search by all ranks: bit for bit that of one process, whatever the number of ranks and threads."""

import pytest
import torch
from gloo import on_ranks

from sslcells import ranks
from sslcells.evaluation import knn, search
from sslcells.evaluation.knn import neighbours
from sslcells.evaluation.search import Search, searching

CPU = torch.device("cpu")


def rows_of(count, seed, width=12):
    """Rows of which some are equal, and one is not finite."""
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    z[count // 2] = z[count // 3]
    z[-1] = torch.nan
    return z


def questions():
    """Queries, bank, k, sources of both, and the centre: with and without each."""
    query, bank = rows_of(37, 0), rows_of(301, 1)
    query[3] = bank[300 // 3]
    own, sources = torch.arange(37) % 5, torch.arange(301) % 11
    yield query, bank, 7
    yield query, bank, 7, own, sources
    yield query, bank, 1, None, None, bank[:-1].mean(0)
    yield query, bank, 400, own, sources, bank[:-1].mean(0)
    yield bank, bank, 3, sources, sources
    yield query, bank[:5], 7
    yield query, bank[:0], 7


def answers(threads, screened):
    """The answers of a search in small chunks, beside those of one process without chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "TILE", 32)
        patch.setattr(search, "CHUNK", 96)
        patch.setattr(knn, "_has_fast_bfloat16", lambda device: screened)
        for module in (knn, search):
            patch.setattr(module, "QUERIES", 8)
        torch.set_num_threads(threads)
        try:
            with searching(CPU) as found:
                if found is None:
                    return None
                return [(found(*question), neighbours(*question)) for question in questions()]
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_that_of_one_process_to_the_bit(threads):
    for (cosine, index), (of_one, where) in answers(threads, screened=False):
        assert torch.equal(cosine, of_one)
        there = of_one.isfinite()  # where fewer rows are left, the index says nothing
        assert torch.equal(index[there], where[there])


def test_screened_neighbours_are_the_same():
    for (cosine, _), (of_one, _) in answers(1, screened=True):
        torch.testing.assert_close(cosine, of_one)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_same_bits_on_any_number_of_ranks(world):
    for screened in (False, True):
        alone = [mine for mine, _ in answers(1, screened)]
        first, *others = on_ranks(world, answers, 2, screened)
        assert others == [None] * (world - 1)
        for one, (several, _) in zip(alone, first, strict=True):
            assert torch.equal(one[0], several[0])
            assert torch.equal(one[1], several[1])


def memory():
    """How many rows this rank compared at a time."""
    seen, plain = [], search.neighbours

    def counted(query, bank, *rest):
        seen.append(len(bank))
        return plain(query, bank, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CHUNK", 50)
        patch.setattr(search, "neighbours", counted)
        with searching(CPU) as found:
            if found is not None:
                found(rows_of(4, 0), rows_of(301, 1), 2)
    return sorted(seen)


def test_a_rank_has_a_chunk_at_a_time():
    assert on_ranks(2, memory) == [[1, 50, 50, 50], [50, 50, 50]]


def failing():
    def broken(*args):
        raise MemoryError(f"rank {ranks.rank()}")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank() == ranks.world() - 1:
            patch.setattr(search, "neighbours", broken)
        patch.setattr(search, "CHUNK", 50)
        try:
            with searching(CPU) as found:
                found and found(rows_of(4, 0), rows_of(301, 1), 2)
        except MemoryError as error:
            return str(error), ranks.all_ranks(ranks.rank())
        return None


def test_an_error_on_one_rank_is_raised_on_all():
    assert on_ranks(2, failing) == [("rank 1", [0, 1])] * 2


def test_what_is_asked_is_checked():
    with pytest.raises(ValueError, match="k=0"), searching(CPU) as found:
        found(rows_of(3, 0), rows_of(9, 1), 0)
    assert Search(CPU, 1)(rows_of(3, 0)[:0], rows_of(9, 1), 2)[0].shape == (0, 2)
