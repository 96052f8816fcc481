import itertools

import pytest
import torch

from megatron_m1.parallel import SequenceLayout, pad_documents

CPU = torch.device("cpu")
EDGES = [0, 3, 3, 4, 21, 24, 40]


def layouts(world: int) -> dict[str, list[SequenceLayout]]:
    """The layout of every rank, 48 tokens a row."""
    per_document = [0, 0, 2 * world, 2 * world, 48]
    return {
        "dense": [SequenceLayout.dense(world=world, rank=r, rows=2, tokens=48) for r in range(world)],
        "pack": [SequenceLayout.pack(world=world, rank=r, cu_seqlens=EDGES, tokens=48) for r in range(world)],
        "per_document": [
            SequenceLayout.per_document(world=world, rank=r, cu_seqlens=per_document) for r in range(world)
        ],
    }


KINDS = ("dense", "pack", "per_document")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_unpartition_undoes_partition_along_any_dimension(kind, world):
    of_ranks = layouts(world)[kind]
    x = torch.randn(2, 48, 3)
    assert torch.equal(of_ranks[0].unpartition(torch.cat([layout.partition(x, 1) for layout in of_ranks], dim=1), 1), x)
    assert torch.equal(of_ranks[-1].partition(x.transpose(0, 1), 0), of_ranks[-1].partition(x, 1).transpose(0, 1))


def test_a_rank_holds_its_two_chunks():
    for rank, layout in enumerate(layouts(4)["pack"]):
        chunks = layout.partition(torch.arange(48), 0).view(2, 6) // 6
        assert chunks.tolist() == [[rank] * 6, [7 - rank] * 6]
    second = layouts(2)["per_document"][1].partition(torch.arange(48), 0)
    # The first document has 4 tokens, the second 44 from token 4 on, in chunks of 11.
    assert second.tolist() == [1, 2, *range(15, 37)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_say_document_and_position_of_every_local_token(kind, world):
    lengths = {"dense": [48, 48], "pack": [*torch.tensor(EDGES).diff().tolist(), 8], "per_document": [0, 2 * world, 0]}
    lengths["per_document"].append(48 - 2 * world)
    rows = 2 if kind == "dense" else 1
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths[kind])]).view(rows, 48)
    positions = torch.cat([torch.arange(n) for n in lengths[kind]]).view(rows, 48)
    for layout in layouts(world)[kind]:
        seen = torch.zeros(rows, layout.local_tokens)
        for piece in layout.local_pieces:
            window = piece.row, slice(piece.local_start, piece.local_start + piece.length)
            seen[window] += 1
            assert (layout.partition(documents, 1)[window] == piece.document).all()
            where = torch.arange(piece.start, piece.start + piece.length)
            assert torch.equal(layout.partition(positions, 1)[window], where)
            assert piece.document_length == lengths[kind][piece.document]
        assert (seen == 1).all()
        edges = layout.cu_seqlens(CPU)
        assert edges.dtype == torch.int32 and edges[-1] == rows * layout.local_tokens
        assert edges.diff().tolist() == [piece.length for piece in layout.local_pieces]
        assert layout.longest_piece == edges.diff().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_goes_on_in_the_next_chunk(kind):
    pieces = [piece for of_rank in layouts(4)[kind][0].pieces for piece in of_rank]
    of_document: dict[int, list] = {}
    for piece in sorted(pieces, key=lambda piece: piece.chunk):
        of_document.setdefault(piece.document, []).append(piece)
    assert any(len(parts) > 1 for parts in of_document.values())
    for parts in of_document.values():
        assert not parts[0].enters and not parts[-1].leaves
        for before, after in itertools.pairwise(parts):
            assert before.leaves and after.enters
            assert (after.chunk, after.start) == (before.chunk + 1, before.start + before.length)


def test_what_cannot_be_laid_out():
    with pytest.raises(ValueError, match=r"has 44 tokens, not a multiple of 2 \* 4 context-parallel ranks; pad it"):
        SequenceLayout.pack(world=4, rank=0, cu_seqlens=[0, 44], tokens=44)
    with pytest.raises(ValueError, match="document 1 has 6 tokens, not a multiple of 2"):
        SequenceLayout.per_document(world=2, rank=0, cu_seqlens=[0, 4, 10])
    with pytest.raises(ValueError, match="must start at 0, never fall, and end at or before T=16"):
        SequenceLayout.pack(world=2, rank=0, cu_seqlens=[0, 8, 24], tokens=16)


def test_documents_are_padded_at_their_ends():
    pack = torch.arange(100, 111).view(1, -1)
    padding = pad_documents([0, 3, 3, 7], tokens=11, unit=4, length=16)
    assert padding.cu_seqlens == [0, 4, 4, 8, 12, 16]
    expected = [100, 101, 102, -1, 103, 104, 105, 106, 107, 108, 109, 110, -1, -1, -1, -1]
    padded = padding.apply(pack, -1)
    assert padded.tolist() == [expected]
    assert torch.equal(padded.index_select(1, padding.places()), pack)
    assert pad_documents([0, 3, 3, 7], tokens=11, unit=4).cu_seqlens == [0, 4, 4, 8, 12]
    with pytest.raises(ValueError, match="have 12 tokens, more than 8"):
        pad_documents([0, 3, 3, 7], tokens=11, unit=4, length=8)
