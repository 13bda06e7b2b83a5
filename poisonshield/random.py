"""Counter-based random numbers (Philox4x32-10): a value depends on (seed, sample, element) and on nothing else.

Neither batch size, order, rank, worker nor device changes what a sample draws, and torch's global generators are
never touched. The price is integer arithmetic in int64: about 15 ns a value on one CPU core.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Key = seed (64 bit), counter =
(element // 4, sample id, offset, stream); the upper half of a 64-bit sample id is folded into the key.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poisonshield.errors import ConfigError
from poisonshield.transfer import send

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (held in int64) of each counter, after 10 rounds. Inputs: int64 in [0, 2^32), broadcastable."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2^64, which keeps every bit that is needed.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_words(
    count: int, *, seed: int | Tensor, ids: Tensor, offset: int | Tensor = 0, stream: int | Tensor = 0
) -> Tensor:
    """`count` 32-bit words for each sample id: int64 [B, count]. ids int64 [B].

    seed any int (64 bits count); seed, offset and stream may be int64 tensors of one element on the device of ids, so
    that a captured CUDA graph can replay with new ones.
    """
    blocks = torch.arange((count + 3) // 4, device=ids.device)
    ids = ids[:, None]
    key = ((seed & _MASK) ^ ((ids >> 32) & _MASK), (ids & 0) + ((seed >> 32) & _MASK))
    counter = (blocks[None, :], ids & _MASK, (ids & 0) + (offset & _MASK), (ids & 0) + (stream & _MASK))
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)  # [B, blocks, 4]
    return words.flatten(1)[:, :count]


def philox_uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
    *,
    sample_ids: Tensor | None = None,
    stream: int | Tensor = 0,
) -> Tensor:
    """Uniform float32 in [0, 1) of `shape` (B, ...): the top 24 bits of each word times 2^-24, exact on every device.

    sample_ids int64 [B], by default 0 .. B-1: row i is a function of (seed, offset, stream, sample_ids[i]) alone.
    Elements count in row-major order of shape[1:]. Device: that of sample_ids, else `device`.
    """
    ids = torch.arange(shape[0], device=device) if sample_ids is None else sample_ids
    words = philox_words(math.prod(shape[1:]), seed=seed, ids=ids, offset=offset, stream=stream)
    return ((words >> 8).to(torch.float32) * 2.0**-24).reshape(tuple(shape))


def philox_normal(
    count: int, *, seed: int | Tensor, ids: Tensor, offset: int | Tensor = 0, stream: int | Tensor = 0
) -> Tensor:
    """Standard normal float32 [B, count] by Box-Muller; equal across devices to a few ulp, not to the bit."""
    pairs = (count + 1) // 2
    u = philox_uniform((len(ids), 2 * pairs), seed, offset, sample_ids=ids, stream=stream)
    return box_muller(u, count)


def box_muller(u: Tensor, count: int) -> Tensor:
    """Standard normal [B, count] of uniform u [B, 2 pairs]."""
    first, second = u.chunk(2, dim=1)
    radius = torch.sqrt(-2.0 * torch.log1p(-first))  # 1 - u lies in (0, 1], so the log is finite
    angle = (2.0 * math.pi) * second
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


def sample_ids(keys: Sequence[str]) -> Tensor:
    """One int64 per key, the same on every machine: the first 8 bytes of its BLAKE2b hash."""
    digests = (hashlib.blake2b(k.encode(), digest_size=8).digest() for k in keys)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)


def stream_of(purpose: str) -> int:
    """A 32-bit stream number for a purpose, so that e.g. crops and attack starts never share numbers."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=4).digest(), "little")


class KeyedRandom:
    """Random numbers of the samples in one batch: `KeyedRandom(seed, ids, offset)`; offset is usually the epoch.

    Each `purpose` within a `scope` is a stream of its own; asking twice with one purpose returns the same numbers.
    """

    def __init__(self, seed: int, ids: Tensor, offset: int = 0, scope: str = "") -> None:
        self.seed, self.ids, self.offset, self.scope = seed, ids, offset, scope

    def stream(self, purpose: str) -> int:
        """The number of a purpose's stream, for an op that draws by itself."""
        return stream_of(f"{self.scope}/{purpose}")

    def uniform(self, purpose: str, count: int) -> Tensor:
        """float32 [B, count] in [0, 1)."""
        shape, stream = (len(self.ids), count), self.stream(purpose)
        return philox_uniform(shape, self.seed, self.offset, sample_ids=self.ids, stream=stream)

    def normal(self, purpose: str, count: int) -> Tensor:
        """float32 [B, count], standard normal."""
        return philox_normal(count, seed=self.seed, ids=self.ids, offset=self.offset, stream=self.stream(purpose))

    def to(self, device: torch.device) -> "KeyedRandom":
        """The same numbers, drawn on `device`."""
        ids = self.ids if self.ids.device == device else send(self.ids, device)
        return KeyedRandom(self.seed, ids, self.offset, self.scope)

    def within(self, scope: str) -> "KeyedRandom":
        """Streams of their own for a part, such as one view."""
        return KeyedRandom(self.seed, self.ids, self.offset, f"{self.scope}/{scope}")


def distinct_signs(count: int, length: int, *, seed: int, purpose: str) -> Tensor:
    """`count` different vertices of {-1, +1}^length, float32 [count, length]: the first different ones drawn by seed.

    Raises ConfigError when there are not that many.
    """
    if length < 31 and count > 2**length:
        raise ConfigError(
            f"{purpose}: {count} classes need different patterns, but {length} signs give only {2**length}.\n"
            f"  Use more cells (a smaller patch, more regions)."
        )
    found: dict[tuple[bool, ...], None] = {}
    start = 0
    while len(found) < count:
        ids = torch.arange(start, start + count)
        draws = philox_uniform((len(ids), length), seed, sample_ids=ids, stream=stream_of(purpose)) < 0.5
        found.update(dict.fromkeys(map(tuple, draws.tolist())))
        start += count
    return torch.tensor(list(found)[:count]).to(torch.float32) * 2 - 1
