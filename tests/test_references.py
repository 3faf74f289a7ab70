"""How ``benchmarks/gpu/references.py`` calls flash-attn and xformers, which are not here: over kernels in torch."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from references import by_flash_attn, by_torch, by_xformers

LENGTHS, SIZE = (5, 17, 1), 8


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
    """As flash-attn documents it, for one query in each sequence."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.tolist() == list(range(len(q) + 1))
    assert (max_seqlen_q, max_seqlen_k) == (1, max(LENGTHS))
    found = []
    for index, query in enumerate(q):
        start, end = cu_seqlens_k[index : index + 2].tolist()
        # [Hq, n, D]
        key, value = (
            part[start:end].repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for part in (k, v)
        )
        found.append(torch.nn.functional.scaled_dot_product_attention(query[:, None], key, value, scale=softmax_scale))
    return torch.stack(found).squeeze(2)


class BlockDiagonalMask:
    """As xformers documents it."""

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen):
        mask = cls()
        mask.lengths = q_seqlen, kv_seqlen
        return mask


def memory_efficient_attention(query, key, value, attn_bias, scale):
    """``[1, tokens, H, D]`` with as many heads in all three."""
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    asked, given = (torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in attn_bias.lengths)
    mask = asked.unsqueeze(1) == given
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_references_agree(monkeypatch, num_kv_heads):
    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
        memory_efficient_attention=memory_efficient_attention,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    torch.manual_seed(0)
    queries = torch.randn(len(LENGTHS), 4, SIZE)
    keys, values = ([torch.randn(num_kv_heads, length, SIZE) for length in LENGTHS] for _ in range(2))
    expected = by_torch(queries, keys, values, 0.3)()
    for reference in (by_flash_attn, by_xformers):
        torch.testing.assert_close(reference(queries, keys, values, 0.3)(), expected)
