"""Lower tiers for vLLM's KV offloading on a machine without a GPU: its scheduler half as it is, and copies by torch.

vLLM starts a copy a step after it was asked for, and nobody knows when a GPU has made it. These copies are made as late
as can be: when somebody waits for them, or after ``LATE`` more steps. What was rewritten or lent to somebody else
before that is stored as it is then.
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from cake_vllm.integration.beside import KVEvictionBesideConnector

#: A test runs as things are; and, with ``--all``, with what it is about taken away, and sees it.
protected = pytest.mark.parametrize("is_protected", [True, pytest.param(False, marks=pytest.mark.full)])
#: A request that is not evicted.
WHOLE = {"extra_args": {"kv_eviction": "none"}}
#: Blocks are scarce: of a prompt of 1,000 tokens there are 32, and 5 columns for what is kept of it.
SCARCE = {
    "kv_eviction": "cake",
    "kv_eviction_budget": 100,
    "max_model_len": 1200,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 49,
}
#: Steps that a copy takes at most.
LATE = 3
#: A chunk's bytes by tensor of its group of layers: ``[blocks, bytes]`` int8 each; of blocks that nobody had any more
#: when it was stored, those of numbers that are none.
Chunk = list[torch.Tensor]


class LateWorker(OffloadingWorker):
    """Copies between blocks of a cache and chunks, in the order in which it is asked.

    Args:
        caches: of this worker.
        blocks_per_chunk: blocks.
        names: the chunks that a job is about.
        read: a chunk.
        write: the same.
    """

    def __init__(
        self,
        caches: CanonicalKVCaches,
        blocks_per_chunk: int,
        names: Callable[[Any], list[Any]],
        read: Callable[[Any], Chunk],
        write: Callable[[Any, Chunk], None],
    ):
        # Without what pads the blocks of layers that are smaller than others'.
        self.groups = [
            [caches.tensors[ref.tensor_idx].tensor[:, : ref.page_size_bytes] for ref in refs]
            for refs in caches.group_data_refs
        ]
        self.size, self.names, self.read, self.write = blocks_per_chunk, names, read, write
        self.queue: deque[tuple[int, int, Callable[[], None]]] = deque()
        self.done: list[int] = []
        self.step = 0

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self.queue.append((job_id, self.step + LATE, lambda: self._store(src_spec, dst_spec)))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self.queue.append((job_id, self.step + LATE, lambda: self._load(src_spec, dst_spec)))
        return True

    def get_finished(self) -> list[TransferResult]:
        self.step += 1
        while self.queue and self.queue[0][1] <= self.step:
            self._copy()
        done, self.done = self.done, []
        return [TransferResult(job_id, True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        while any(job_id in job_ids for job_id, *_ in self.queue):
            self._copy()

    def _copy(self) -> None:
        job_id, _, copy = self.queue.popleft()
        copy()
        self.done.append(job_id)

    def _store(self, source: GPULoadStoreSpec, target: LoadStoreSpec) -> None:
        for name, tensors, first, blocks in self._parts(source, self.names(target)):
            chunk = [torch.full((self.size, tensor.shape[1] // 4), torch.nan).view(torch.int8) for tensor in tensors]
            for part, tensor in zip(chunk, tensors, strict=True):
                part[first : first + len(blocks)] = tensor[blocks]
            self.write(name, chunk)

    def _load(self, source: LoadStoreSpec, target: GPULoadStoreSpec) -> None:
        for name, tensors, first, blocks in self._parts(target, self.names(source)):
            for part, tensor in zip(self.read(name), tensors, strict=True):
                tensor[blocks] = part[first : first + len(blocks)]

    def _parts(
        self, spec: GPULoadStoreSpec, names: list[Any]
    ) -> Iterator[tuple[Any, list[torch.Tensor], int, torch.Tensor]]:
        """Of each chunk its name, the tensors of its group, where in it what is copied begins, and its blocks there.

        Of a group's first chunk a first part may be left out, of its last one a last part.
        """
        left, blocks = iter(names), torch.from_numpy(spec.block_ids).long()
        for tensors, of_group, index in zip(
            self.groups, blocks.split(list(spec.group_sizes)), spec.block_indices, strict=True
        ):
            first = index % self.size
            while len(of_group):
                part, of_group = of_group[: self.size - first], of_group[self.size - first :]
                yield next(left), tensors, first, part
                first = 0
        assert next(left, None) is None


class MemorySpec(CPUOffloadingSpec):
    """vLLM's own manager of chunks in host memory, and copies that are late."""

    #: By number, of the engine that runs.
    chunks: ClassVar[dict[int, Chunk]] = {}

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        chunks = self.chunks
        chunks.clear()
        return LateWorker(
            kv_caches,
            self.blocks_per_chunk,
            lambda spec: spec.chunk_ids.tolist(),
            chunks.__getitem__,
            chunks.__setitem__,
        )


@dataclass
class Files(LoadStoreSpec):
    """Chunks on disk."""

    paths: list[Path]


class DiskManager(OffloadingManager):
    """A file for each chunk, in a folder that engines share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.on_the_way: set[OffloadKey] = set()

    def _files(self, keys: Collection[OffloadKey]) -> Files:
        return Files([self.folder / key.hex() for key in keys])

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if key in self.on_the_way:
            return LookupResult.HIT_PENDING
        return LookupResult.HIT if self._files([key]).paths[0].exists() else LookupResult.MISS

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        return self._files(keys)

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        new = [key for key in keys if self.lookup(key, req_context) is LookupResult.MISS]
        self.on_the_way.update(new)
        return PrepareStoreOutput(new, self._files(new), [])

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        self.on_the_way.difference_update(keys)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()


class DiskSpec(OffloadingSpec):
    """Chunks that outlive their engine, in the folder ``path``."""

    def get_manager(self) -> OffloadingManager:
        return DiskManager(Path(self.extra_config["path"]))

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return LateWorker(kv_caches, self.blocks_per_chunk, lambda spec: spec.paths, torch.load, _save)


def _save(path: Path, chunk: Chunk) -> None:
    torch.save(chunk, path)


def transfer(spec: str = "MemorySpec", **extra: Any) -> dict[str, Any]:
    """Such a tier as vLLM's ``--kv-transfer-config`` names it."""
    config = {"spec_name": spec, "spec_module_path": "tiers", "cpu_bytes_to_use": 2**26, **extra}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": config}


def beside(spec: str = "MemorySpec", **extra: Any) -> dict[str, Any]:
    """What an engine in this process is started with to have it."""
    return {"kv_transfer_config": KVTransferConfig(**transfer(spec, **extra))}


class Tier:
    """What an engine's lower tier holds, for tests to look into."""

    def __init__(self, engine: Any):
        connector = engine.scheduler.connector
        self.engine, self.half = engine, getattr(connector, "_theirs", connector).scheduler

    def drain(self) -> None:
        """Lets all copies end; nothing is left of any request."""
        while self.engine.scheduler.connector.has_pending_push_work() or self.half._req_status:
            self.engine.step()
        assert not self.half._jobs
        assert not self.half._block_id_to_pending_jobs
        assert not self.half.manager._num_write_pending_chunks
        assert self.half.manager._num_evictable_cache_chunks == len(self.chunks())

    def chunks(self) -> dict[bytes, Chunk]:
        """What can be loaded, by key."""
        policy = self.half.manager._policy
        return {
            bytes(key): MemorySpec.chunks[status.chunk_id] for key, status in policy.chunks.items() if status.is_ready
        }

    def lose(self, key: OffloadKey) -> None:
        """Forgets a chunk, as it does for want of room."""
        self.half.manager._policy.remove(key)
        self.half.manager._num_evictable_cache_chunks -= 1

    def forget(self) -> None:
        """Empties it, and the prefix cache."""
        self.drain()
        assert self.engine.scheduler.reset_prefix_cache(reset_connector=True)


def exact_chunks(engine: Any, prompts: list[list[int]], **params) -> dict[bytes, Chunk]:
    """What prompts store that nobody evicts; the engine has forgotten them."""
    tier = Tier(engine)
    tier.forget()
    for prompt in prompts:
        engine.generate([prompt], 1, **WHOLE, **params)
    tier.drain()
    chunks = {key: [part.clone() for part in chunk] for key, chunk in tier.chunks().items()}
    tier.forget()
    return chunks


def inexact(chunks: dict[bytes, Chunk], exact: dict[bytes, Chunk]) -> int:
    """How many chunks are not what they are called; the same numbers in other shapes of computation are."""
    return sum(not _is_same(chunk, exact[key]) for key, chunk in chunks.items())


def _is_same(chunk: Chunk, exact: Chunk) -> bool:
    ours, theirs = (torch.stack(of).view(torch.float32) for of in (chunk, exact))
    is_there = ~(ours.isnan() | theirs.isnan()).all(dim=2)
    return torch.allclose(ours[is_there], theirs[is_there], rtol=1e-3, atol=1e-4)


def of_target(engine: Any, chunks: dict[bytes, Chunk]) -> dict[bytes, Chunk]:
    """What layers stored that do not draft, of a model whose layers are all evicted."""
    return {key: chunk[: len(engine.connector.worker.layers.target)] for key, chunk in chunks.items()}


def assert_stored(tier: "Tier", exact: dict[bytes, Chunk], is_exact: bool, with_drafts: bool = True) -> None:
    """Once all is copied, every chunk is there, and is what it is called if it is to be: all layers' part, or those'
    that do not draft.
    """
    tier.drain()
    chunks = tier.chunks()
    assert chunks.keys() == exact.keys()
    if not with_drafts:
        chunks, exact = of_target(tier.engine, chunks), of_target(tier.engine, exact)
    assert (inexact(chunks, exact) == 0) == is_exact


def store(
    engine: Any, prompts: list[list[int]], num_tokens: int, is_protected: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple["Tier", dict[bytes, Chunk]]:
    """Serves prompts that come together; the tier, and what they store there if nobody evicts them."""
    exact = exact_chunks(engine, prompts)
    engine.stats()
    if not is_protected:
        unprotected(monkeypatch)
    for prompt in prompts:
        engine.add(prompt, num_tokens)
    engine.run()
    return Tier(engine), exact


def unprotected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are not waited for."""
    monkeypatch.setattr(KVEvictionBesideConnector, "_wait_for", lambda *_: None)


def serve_at_random(engine: Any, prompts: list[list[int]], num_rounds: int, dice: random.Random) -> None:
    """Requests come, some of them to be served whole, and are aborted at any moment."""
    alive: list[str] = []
    for _ in range(num_rounds):
        whole = WHOLE if dice.random() < 0.3 else {}
        alive.append(engine.add(dice.choice(prompts), dice.randint(1, 60), **whole))
        for _ in range(dice.randrange(6)):
            engine.step()
        if dice.random() < 0.2:
            engine.abort(alive.pop(dice.randrange(len(alive))))
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()


def loads(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that admitted requests get from the lower tier, from now on."""
    connector, found = engine.scheduler.connector, []
    original = connector.update_state_after_alloc

    def noting(request, blocks, num_external_tokens):
        if num_external_tokens:
            found.append(num_external_tokens)
        original(request, blocks, num_external_tokens)

    monkeypatch.setattr(connector, "update_state_after_alloc", noting)
    return found
