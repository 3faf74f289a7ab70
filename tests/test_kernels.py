"""Page and row kernels against element-by-element references, in arbitrary block layouts."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_vllm.integration.worker import dealing
from cake_vllm.kernels import BlockLayout, EvictedRows, Grid, budget_for, columns_for, deal
from cake_vllm.kernels.pages import find_strides

HEADS, BLOCK, SIZE, BLOCKS = 3, 8, 4, 20


@pytest.fixture(params=["plain", "transposed", "tiles", "shuffled"])
def layout(request, device) -> BlockLayout:
    made = make_layout(request.param)
    return BlockLayout(made.key_index.to(device), made.value_index.to(device))


def make_layout(name: str) -> BlockLayout:
    count = BLOCK * SIZE
    plain = torch.arange(count).view(BLOCK, SIZE)
    if name == "plain":
        return BlockLayout(plain, plain + count)
    if name == "transposed":
        return BlockLayout(torch.arange(count).view(SIZE, BLOCK).T.contiguous(), plain + count)
    if name == "tiles":
        tiles = torch.arange(count).view(BLOCK // 4, SIZE // 2, 4, 2).transpose(1, 2).reshape(BLOCK, SIZE)
        return BlockLayout(tiles, plain + count)
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).view(2, BLOCK, SIZE)
    return BlockLayout(order[0], order[1])


def element(cache, layout, index, pages, position):
    """One key or value, the slow way."""
    page = cache[pages[position // BLOCK]]
    return [page[place].item() for place in index[position % BLOCK]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, BLOCK, 3 * BLOCK - 1])
def test_read(layout, num_tokens, dtype, device):
    cache = torch.randn(BLOCKS, 2 * BLOCK * SIZE, dtype=dtype, device=device)
    table = torch.tensor([[7, 3, 11, 2], [0, 19, 1, 5], [4, 4, 6, 8]], device=device)
    for read, index in ((layout.read_keys, layout.key_index), (layout.read_values, layout.value_index)):
        found = read(cache, table, num_tokens)
        assert found.shape == (HEADS, num_tokens, SIZE)
        for head in range(HEADS):
            for position in range(num_tokens):
                assert found[head, position].tolist() == element(cache, layout, index, table[head], position)


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
@pytest.mark.parametrize("target", [[15, 4], [7, 3], [3, 7]], ids=["copied", "in-place", "in-place-crossed"])
def test_move(layout, target, dtype, device):
    # Not the first of its buffer.
    cache = torch.randn(2 * BLOCKS, 2 * BLOCK * SIZE, dtype=dtype, device=device)[BLOCKS:]
    before = cache.clone()
    table = torch.tensor([7, 3, 11, 2], device=device)
    positions = torch.randperm(4 * BLOCK, device=device)[: 2 * BLOCK].sort().values
    layout.move(cache, table[positions // BLOCK], positions % BLOCK, torch.tensor(target, device=device))
    for index in (layout.key_index, layout.value_index):
        for place, position in enumerate(positions.tolist()):
            assert element(cache, layout, index, target, place) == element(before, layout, index, table, position)
    untouched = [page for page in range(BLOCKS) if page not in target]
    assert torch.equal(cache[untouched], before[untouched])


def test_move_nothing(layout):
    cache = torch.randn(BLOCKS, 2 * BLOCK * SIZE)
    before = cache.clone()
    nothing = torch.empty(0, dtype=torch.int64)
    layout.move(cache, nothing, nothing, nothing)
    assert torch.equal(cache, before)


def test_move_refuses_a_partial_page(layout):
    cache = torch.zeros(BLOCKS, 2 * BLOCK * SIZE)
    tokens = torch.zeros(BLOCK + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fill 1 pages"):
        layout.move(cache, tokens, tokens, torch.tensor([2]))


def lay_out(num_layers: int, num_blocks: int, by_block: bool, device: str = "cpu") -> list[torch.Tensor]:
    """The layers' caches in one buffer as vLLM lays them out, layer by layer or block by block."""
    page = HEADS * BLOCK * 2 * SIZE
    buffer = torch.arange(num_layers * num_blocks * page, dtype=torch.float64, device=device)
    shape = (num_blocks, HEADS, BLOCK, 2 * SIZE)
    inner = (BLOCK * 2 * SIZE, 2 * SIZE, 1)
    strides, offset = (page * num_layers, page) if by_block else (page, page * num_blocks)
    return [buffer.as_strided(shape, (strides, *inner), layer * offset) for layer in range(num_layers)]


@pytest.mark.parametrize("budget", [1, 32, 500, 512, 1024])
@pytest.mark.parametrize(("block_size", "page_size"), [(32, 32), (128, 32), (528, 16), (784, 16)])
def test_a_request_rounds_up_to_columns_once(block_size, page_size, budget):
    """At most a block more than its budget in whole pages."""
    columns = columns_for(budget, block_size, page_size)
    in_pages = -(-budget // page_size) * page_size
    assert -(-in_pages // block_size) <= columns <= -(-in_pages // block_size) + 1
    most = budget_for(columns, block_size, page_size)
    assert budget <= most
    assert [columns_for(most + more, block_size, page_size) for more in (0, 1)] == [columns, columns + 1]


@pytest.mark.parametrize("by_block", [False, True])
def test_the_grid_finds_every_page(by_block):
    caches = lay_out(4, 6, by_block)
    grid = Grid.of(caches[1:], [0, 0, 1])
    for layer, cache in enumerate(caches[1:]):
        for block in range(6):
            (page,) = grid.layer_pages(layer, torch.tensor([block])).tolist()
            assert torch.equal(grid.pages[page], cache[block])
            for head, head_page in enumerate(grid.heads_of(torch.tensor([page])).flatten().tolist()):
                assert torch.equal(grid.cache[head_page], cache[block, head].flatten())
                assert torch.equal(grid.head_pages[head_page, 0], cache[block, head])
    homes = grid.homes([[5, 2], [0, 3]], by_head=True)
    assert homes.shape == (2, 3 * HEADS)
    for column, blocks in enumerate([(5, 5, 0), (2, 2, 3)]):
        for layer, block in enumerate(blocks):
            for head in range(HEADS):
                page = homes[column, layer * HEADS + head]
                assert torch.equal(grid.cache[page], caches[1 + layer][block, head].flatten())


def test_blocks_of_several_pages():
    """Every layer has a page in each slice of a block; what is at home in one column has all of these."""
    caches = lay_out(2, 6, by_block=False)
    grid = Grid.of(caches, [0, 1], per_block=3)
    assert (grid.num_blocks, grid.page_size, grid.block_size) == (2, BLOCK, 3 * BLOCK)
    assert grid.slices(torch.tensor([[1, 0]])).tolist() == [[3, 4, 5, 0, 1, 2]]
    homes = grid.homes([[1], [0]], by_head=False)
    assert homes.shape == (3, 2)
    for place, (first, second) in enumerate(homes.tolist()):
        assert torch.equal(grid.pages[first], caches[0][3 + place])
        assert torch.equal(grid.pages[second], caches[1][place])


@pytest.mark.parametrize("where", ["pool", "in-place"])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("per_block", [1, 3])
def test_tokens_reach_the_pages_that_are_dealt(per_block, by_head, where):
    """Evicted twice: each owner reads what it kept, in order, and what was dealt is the columns' own."""
    generator, layers = torch.Generator().manual_seed(7), 3
    caches = lay_out(layers, 16 * per_block, by_block=False)
    grid, layout = Grid.of(caches, [0] * layers, per_block), make_layout("tiles")
    each, held = HEADS if by_head else 1, None
    row, columns = list(range(2, 10)), [12, 13, 14] if where == "pool" else [7, 8, 9]
    end, slices = len(row) * grid.block_size + 3, grid.slices(torch.tensor([*row, 11]))
    for most in (3 * per_block, 2 * per_block):
        reads = [dealing.read(grid, layer, held, [slices], end) for layer in range(layers)]
        before = [layout.read_keys(grid.cache, of.table, of.length) for of in reads]
        counts = [[int(torch.randint(most + 1, (), generator=generator)) for _ in range(each)]]
        counts += [[most] * each] * (layers - 1)
        chosen = []
        for layer, of in enumerate(reads):
            pages = [min(counts[layer][head % each], of.full_len // BLOCK - of.missing[head]) for head in range(HEADS)]
            orders = [
                torch.randperm(of.full_len - of.missing[head] * BLOCK, generator=generator) for head in range(HEADS)
            ]
            kept = [order[: num * BLOCK].sort().values for order, num in zip(orders, pages, strict=True)]
            chosen.append([head + num * BLOCK for head, num in zip(kept, of.missing, strict=True)])
        used = np.array([len(head) // BLOCK for of_layer in chosen for head in of_layer[:each]])
        pages, last, num_columns = dealing.redeal(grid, held, [columns], by_head, used)
        assert num_columns <= -(-most // per_block)
        dealt = [page for mine, num in zip(pages.tolist(), used, strict=True) for page in mine[:num]]
        assert len(set(dealt)) == len(dealt)
        assert set(dealt) <= set(grid.homes([columns[:num_columns]], by_head).ravel().tolist())
        new = dealing.Held(by_head, len(row), pages, used, used, num_columns, tuple(map(tuple, counts)))
        list(dealing.move(grid, layout, reads, chosen, new, last))
        held = new
        for layer in range(layers):
            after = dealing.read(grid, layer, held, [slices], end)
            found = layout.read_keys(grid.cache, after.table, after.length)
            assert after.tail == end % grid.block_size
            for head in range(HEADS):
                gone = after.missing[head] * BLOCK
                expected = torch.cat([before[layer][head][chosen[layer][head]], before[layer][head][-after.tail :]])
                assert torch.equal(found[head][gone:], expected)


def test_caches_that_lie_on_no_grid_are_refused():
    caches = lay_out(2, 6, by_block=False)
    for broken in ([caches[0], caches[1].clone()], [caches[0], caches[1][:5]], [cache[:, :2] for cache in caches]):
        with pytest.raises(RuntimeError, match="in one buffer of equal pages"):
            Grid.of(broken, [0, 0])


@st.composite
def dealings(draw):
    """Columns of a few owners, what they hold there, and what they shall have."""
    num_owners, num_held = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    pages = draw(st.permutations(range(num_owners * num_held)))
    held: list[list[int]] = [[] for _ in range(num_owners)]
    for page in pages:
        owner = draw(st.integers(-1, num_owners - 1))
        if owner >= 0:
            held[owner].append(page)
    num_columns = draw(st.integers(1, num_held))
    needs, left = [], num_columns * num_owners
    for _ in range(num_owners):
        needs.append(draw(st.integers(0, min(left, num_held + 2))))
        left -= needs[-1]
    return held, draw(st.permutations(needs)), num_columns


@given(dealings())
@settings(deadline=None, max_examples=300)
def test_pages_are_dealt_so_that_nobody_overwrites_what_is_still_read(dealing):
    held, needs, num_columns = dealing
    width = max(map(len, held))
    table = np.array([[*pages, *[-1] * (width - len(pages))] for pages in held], dtype=np.int64)
    dealt, last = deal(table.reshape(len(held), width), np.array(needs), num_columns)
    assert all(set(pages[need:]) <= {-1} for pages, need in zip(dealt.tolist(), needs, strict=True))
    dealt = [pages[:need] for pages, need in zip(dealt.tolist(), needs, strict=True)]
    everything = [page for pages in dealt for page in pages]
    assert len(set(everything)) == len(everything) == sum(needs)
    assert all(0 <= page < num_columns * len(held) for page in everything)
    order = [owner for moved_last in (False, True) for owner in range(len(held)) if last[owner] == moved_last]
    still_read = {page: owner for owner, pages in enumerate(held) for page in pages}
    for owner in order:
        assert all(still_read.get(page, owner) == owner for page in dealt[owner])
        still_read = {page: reader for page, reader in still_read.items() if reader != owner}


def test_too_few_columns_are_refused():
    with pytest.raises(ValueError, match="1 columns of 2 pages are too few: 1 missing"):
        deal(np.array([[0], [1]]), np.array([2, 1]), 1)


class Model:
    """What :class:`EvictedRows` should say, in lists."""

    def __init__(self, grid: Grid, by_head: bool):
        self.grid, self.num_heads = grid, HEADS if by_head else 1
        self.stored: dict[str, tuple[list[list[int]], int, list[tuple[int, ...]]]] = {}

    def reads(self, name: str, layer: int, head: int, seq_len: int) -> tuple[list[int], int]:
        pages, start, tail = self.stored[name]
        mine = pages[layer * self.num_heads + head]
        group = self.grid.group_of[layer]
        each = self.grid.per_block
        slices = [blocks[group] * each + place for blocks in tail for place in range(each)]
        rest = [self.grid.base[layer] + index * self.grid.step for index in slices]
        if self.num_heads > 1:
            rest = [page * HEADS + head for page in rest]
        return mine + rest, seq_len - (start * each - len(mine)) * BLOCK


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("per_block", [1, 3])
def test_rows_are_what_lists_would_be(by_head, per_block, device):
    dice = random.Random(5)
    grid = Grid.of(lay_out(3, 400 * per_block, by_block=False, device=device), [0, 1, 0], per_block)
    rows, model = EvictedRows(grid, by_head), Model(grid, by_head)
    free = list(range(1, 400))
    owners = 3 * model.num_heads
    for _ in range(60):
        name = f"r{dice.randrange(9)}"
        action = dice.random()
        if name in model.stored and action < 0.3:
            rows.discard(name)
            (*_, tail) = model.stored.pop(name)
            # Others may have their blocks now.
            assert not rows.find(torch.tensor([block for block, _ in tail], dtype=torch.int64)).any()
        elif name in model.stored and action < 0.7:
            new = [(free.pop(), free.pop()) for _ in range(dice.randrange(3))]
            rows.append({name: list(zip(*new, strict=True)) or [(), ()], "unknown": [(7,), (8,)]})
            model.stored[name][2].extend(new)
        else:
            counts = [dice.randrange(4) for _ in range(owners)]
            pages = [[dice.randrange(1000) for _ in range(count)] for count in counts]
            tail = [(free.pop(), free.pop()) for _ in range(dice.randrange(2))]
            table = np.array([mine + [0] * (max(counts) - len(mine)) for mine in pages], dtype=np.int64)
            rows.store(
                name,
                table.reshape(owners, max(counts)),
                np.array(counts),
                9,
                list(zip(*tail, strict=True)) or [(), ()],
            )
            model.stored[name] = pages, 9, tail
        assert len(rows) == len(model.stored)
        batch = [name for name in model.stored if model.stored[name][2]]
        if not batch:
            continue
        dice.shuffle(batch)
        seq_lens = [
            (9 + len(model.stored[name][2])) * grid.block_size - dice.randrange(grid.block_size) for name in batch
        ]
        # Between them, a row that was never evicted.
        tails = torch.tensor([model.stored[name][2][-1][0] for name in batch] + [0], dtype=torch.int32, device=device)
        slots = rows.find(tails)
        assert (slots > 0).tolist() == [True] * len(batch) + [False]
        tables, num_dropped = rows.select(slots[:-1])
        assert tables.is_contiguous()
        for index, (name, seq_len) in enumerate(zip(batch, seq_lens, strict=True)):
            for layer in range(3):
                for head in range(model.num_heads):
                    expected, length = model.reads(name, layer, head, seq_len)
                    assert seq_len - int(num_dropped[layer, index, head]) * BLOCK == length
                    assert tables[layer, index * model.num_heads + head, : len(expected)].tolist() == expected
