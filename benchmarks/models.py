"""What eviction is worth, by model: arithmetic from published shapes, no weights and no engine.

Prints the table of ``docs/models.md``. A request holds its tokens in layers of full attention, a window or a chunk in
those that have one, and one state in those that keep one; eviction leaves a share of the first. Requests are what fits
into 92% of each GPU's 80 GB less the weights, nothing else counted. KV heads are divided among the GPUs, and repeated
where there are fewer; caches and states are 16 bits.

    python benchmarks/models.py
"""

from dataclasses import dataclass

from cake_vllm.tools.options import readable

LENGTHS, SHARES = (32_768, 131_072), (1.0, 0.2, 0.1)
MEMORY, USED, BYTES = 80e9, 0.92, 2


@dataclass(frozen=True)
class Model:
    """Of its config, and its checkpoint.

    Attributes:
        name: where it is published.
        full: layers of full attention.
        heads: KV heads.
        size: of a head.
        weights: bytes of the checkpoint, as published, in units of 10^9.
        gpus: of 80 GB each.
        near: layers with a window, or with chunks.
        window: tokens that these hold of a request at most.
        stateful: layers that keep a state.
        state: numbers in a state.
    """

    name: str
    full: int
    heads: int
    size: int
    weights: float
    gpus: int = 1
    near: int = 0
    window: int = 0
    stateful: int = 0
    state: int = 0

    def token(self, gpus: int = 1) -> int:
        """Bytes of a token in a layer, on each of so many GPUs."""
        return 2 * max(self.heads // gpus, 1) * self.size * BYTES

    def held(self, length: int, share: float, gpus: int = 1) -> float:
        """Bytes of a request on each of so many GPUs, with a share kept where it can be evicted."""
        tokens = self.full * length * share + self.near * min(self.window, length)
        return tokens * self.token(gpus) + self.stateful * self.state * BYTES / gpus

    def requests(self, length: int, share: float) -> int:
        """How many fit."""
        pool = MEMORY * USED - self.weights * 1e9 / self.gpus
        return int(pool // self.held(length, share, self.gpus))


def delta(key_heads: int, value_heads: int, size: int) -> int:
    """Numbers in the state of a gated delta net with a convolution of four."""
    return value_heads * size * size + 3 * (2 * key_heads + value_heads) * size


def mamba2(heads: int, head_size: int, state_size: int, groups: int) -> int:
    """Numbers in a state of Mamba 2 with a convolution of four."""
    return heads * head_size * state_size + 3 * (heads * head_size + 2 * groups * state_size)


MODELS = (
    Model("meta-llama/Llama-3.1-8B-Instruct", 32, 8, 128, 16.1),
    Model("meta-llama/Llama-3.3-70B-Instruct", 80, 8, 128, 141.1, 8),
    Model("Qwen/Qwen2.5-7B-Instruct", 28, 4, 128, 15.2),
    Model("Qwen/Qwen3-8B", 36, 8, 128, 16.4),
    Model("Qwen/Qwen3-32B", 64, 8, 128, 65.5),
    Model("Qwen/Qwen3-30B-A3B", 48, 4, 128, 61.1),
    Model("Qwen/Qwen3-235B-A22B", 94, 4, 128, 470.2, 8),
    Model("mistralai/Mistral-Small-24B-Instruct-2501", 40, 8, 128, 47.1),
    Model("zai-org/GLM-4.5-Air", 46, 8, 128, 221.0, 8),
    Model("google/gemma-3-27b-it", 10, 16, 128, 54.9, near=52, window=1024),
    Model("openai/gpt-oss-20b", 12, 8, 64, 13.8, near=12, window=128),
    Model("openai/gpt-oss-120b", 18, 8, 64, 65.3, near=18, window=128),
    Model("meta-llama/Llama-4-Scout-17B-16E-Instruct", 12, 8, 128, 217.3, 8, near=36, window=8192),
    Model("Qwen/Qwen3-Next-80B-A3B-Instruct", 12, 2, 256, 162.7, 8, stateful=36, state=delta(16, 32, 128)),
    Model("ibm-granite/granite-4.0-h-small", 4, 8, 128, 64.4, stateful=36, state=mamba2(128, 64, 128, 1)),
    Model("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 6, 2, 128, 63.2, stateful=23, state=mamba2(64, 64, 128, 8)),
)


def table() -> str:
    """Markdown."""
    lengths = [f"{length // 1024}K" for length in LENGTHS]
    head = ["model", "GPUs", "evicted layers", "KV a token", "beside it"]
    head += [f"{length}: held" for length in lengths] + [f"{length}: fit" for length in lengths]
    rows = [head, ["---"] * len(head)]
    for model in MODELS:
        beside = [f"{model.near} layers of {model.window:,} tokens"] if model.near else []
        beside += [f"states, {readable(model.stateful * model.state * BYTES)}"] if model.stateful else []
        layers = model.full + model.near + model.stateful
        row = [f"`{model.name}`", str(model.gpus), f"{model.full} of {layers}", readable(model.full * model.token())]
        row += [", ".join(beside)]
        row += [" / ".join(readable(round(model.held(length, share))) for share in SHARES) for length in LENGTHS]
        row += [" / ".join(f"{model.requests(length, share):,}" for share in SHARES) for length in LENGTHS]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
