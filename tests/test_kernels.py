"""Page and row kernels against element-by-element references, in arbitrary block layouts."""

import pytest
import torch

from cake_vllm.kernels import BlockLayout, EvictedRows
from cake_vllm.kernels.pages import find_strides

HEADS, BLOCK, SIZE, BLOCKS = 3, 8, 4, 20


@pytest.fixture(params=["plain", "transposed", "tiles", "shuffled"])
def layout(request) -> BlockLayout:
    count = BLOCK * SIZE
    plain = torch.arange(count).view(BLOCK, SIZE)
    if request.param == "plain":
        return BlockLayout(plain, plain + count)
    if request.param == "transposed":
        return BlockLayout(torch.arange(count).view(SIZE, BLOCK).T.contiguous(), plain + count)
    if request.param == "tiles":
        tiles = torch.arange(count).view(BLOCK // 4, SIZE // 2, 4, 2).transpose(1, 2).reshape(BLOCK, SIZE)
        return BlockLayout(tiles, plain + count)
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).view(2, BLOCK, SIZE)
    return BlockLayout(order[0], order[1])


def element(cache, layout, index, blocks, head, position):
    """One key or value, the slow way."""
    block = cache[blocks[position // BLOCK], head]
    return [block[place].item() for place in index[position % BLOCK]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, BLOCK, 3 * BLOCK - 1])
def test_read(layout, num_tokens, dtype):
    cache = torch.randn(BLOCKS, HEADS, 2 * BLOCK * SIZE, dtype=dtype)
    blocks = torch.tensor([7, 3, 11, 2])
    for read, index in ((layout.read_keys, layout.key_index), (layout.read_values, layout.value_index)):
        found = read(cache, blocks, num_tokens)
        assert found.shape == (HEADS, num_tokens, SIZE)
        for head in range(HEADS):
            for position in range(num_tokens):
                assert found[head, position].tolist() == element(cache, layout, index, blocks, head, position)


def test_strides():
    """The units in which an order is regular, or that it is not."""
    count = BLOCK * SIZE
    plain = torch.arange(count).view(BLOCK, SIZE)
    assert find_strides(plain, 4) == (4, 0, ((BLOCK, 1),), ((1, 1),))
    assert find_strides(plain + count, 2) == (2, count // 2, ((BLOCK, SIZE // 2),), ((SIZE // 2, 1),))
    assert find_strides(plain + 1, 4) == (1, 1, ((BLOCK, SIZE),), ((SIZE, 1),))
    assert find_strides(plain.flatten().view(SIZE, BLOCK).T, 4) == (1, 0, ((BLOCK, 1),), ((SIZE, BLOCK),))
    # As for matrix units: tiles of four slots, in which pairs of channels lie side by side.
    tiles = torch.arange(count).view(BLOCK // 4, SIZE // 2, 4, 2).transpose(1, 2).reshape(BLOCK, SIZE)
    assert find_strides(tiles, 4) == (2, 0, ((2, 8), (4, 1)), ((2, 4), (1, 1)))
    shuffled = plain.clone()
    shuffled[2, 1:3] = plain[2, 1:3].flip(0)
    assert find_strides(shuffled, 4) is None
    assert find_strides(plain[torch.randperm(BLOCK, generator=torch.Generator().manual_seed(1))], 4) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pages", [[15, 4], [7, 3], [3, 7]], ids=["copied", "in-place", "in-place-crossed"])
def test_compact(layout, pages, dtype):
    # One of several layers whose blocks lie side by side.
    cache = torch.randn(BLOCKS, 2 * HEADS, 2 * BLOCK * SIZE, dtype=dtype)[:, HEADS:]
    before = cache.clone()
    blocks = torch.tensor([7, 3, 11, 2])
    positions = torch.stack([torch.randperm(4 * BLOCK)[: 2 * BLOCK].sort().values for _ in range(HEADS)])
    layout.compact(cache, blocks, positions, torch.tensor(pages))
    for index in (layout.key_index, layout.value_index):
        for head in range(HEADS):
            for place, position in enumerate(positions[head].tolist()):
                moved = element(cache, layout, index, torch.tensor(pages), head, place)
                assert moved == element(before, layout, index, blocks, head, position)
    untouched = [block for block in range(BLOCKS) if block not in pages]
    assert torch.equal(cache[untouched], before[untouched])


def test_compact_to_nothing(layout):
    cache = torch.randn(BLOCKS, HEADS, 2 * BLOCK * SIZE)
    before = cache.clone()
    nothing = torch.empty(HEADS, 0, dtype=torch.int64)
    layout.compact(cache, torch.tensor([0, 1]), nothing, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, before)


def test_compact_refuses_a_partial_page(layout):
    cache = torch.zeros(BLOCKS, HEADS, 2 * BLOCK * SIZE)
    positions = torch.zeros(HEADS, BLOCK + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fill 1 pages"):
        layout.compact(cache, torch.tensor([0, 1]), positions, torch.tensor([2]))


def test_rows_compose_like_lists():
    generator = torch.Generator().manual_seed(1)
    num_layers, num_rows, columns = 3, 4, 12
    rows = EvictedRows(num_layers, BLOCK, "cpu")
    # (pages, start) of each layer; the last request keeps everything in one layer.
    kept = {
        "a": [([90, 91], 5), ([92], 5), ([93, 94, 95], 5)],
        "b": [([80], 9), ([], 0), ([81, 82, 83, 84, 85, 86, 87], 9)],
        "c": [([70], 1), ([71], 1), ([72], 1)],
    }
    for name, layers in kept.items():
        rows.store(name, [pages for pages, _ in layers], [start for _, start in layers])
    batch = ["b", None, "a", "c"]
    seq_lens = torch.tensor([9 * BLOCK + 3, 40, 5 * BLOCK + 1, 95], dtype=torch.int32)
    tables = torch.randint(1, 60, (num_layers, num_rows, columns), generator=generator, dtype=torch.int32)
    slots = torch.tensor([rows.slot(name) if name else 0 for name in batch])
    composed, lengths = rows.compose(tables, seq_lens, slots)
    assert composed.is_contiguous()
    assert lengths.is_contiguous()
    for layer in range(num_layers):
        for row, name in enumerate(batch):
            pages, start = kept[name][layer] if name else ([], 0)
            expected = pages + tables[layer, row, start:].tolist()
            length = int(seq_lens[row]) - (start - len(pages)) * BLOCK
            used = -(-length // BLOCK)
            assert lengths[layer, row] == length
            assert composed[layer, row, :used].tolist() == expected[:used]


def test_rows_reuse_slots_and_grow():
    rows = EvictedRows(2, BLOCK, "cpu")
    for round_ in range(3):
        for i in range(9):
            rows.store(f"{round_}-{i}", [[i], [i, i]], [4, 4])
        assert len(rows) == 9
        assert len({rows.slot(f"{round_}-{i}") for i in range(9)} - {0}) == 9
        for i in range(9):
            rows.discard(f"{round_}-{i}")
        rows.discard("unknown")
    assert len(rows) == 0
    assert rows.slot("0-0") == 0
