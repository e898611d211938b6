"""The dropout masks of the down branch. Either is a function of a seed: backward, and a recomputation, draw it again.

- The counted mask, of Triton, of the reference and of PyTorch on a GPU, is also a function of an entry's place. The
  entry of token i, expert e, column f is dropped where a 16-bit number is below `threshold`: half f % 2 of word
  f % 8 // 2 of Philox-4x32-10 (Salmon et al., SC 2011) with the seed as its key and (f // 8, i, e, 0) as its counter.
  Nobody reads the seed, and tiles may be computed in any order.
- The drawn mask, of PyTorch on a CPU, is a sequence of PyTorch's own generator, one number for each token and column:
  a token's experts share it, as those of the gate and up projections share that of x. It takes a tenth of the time; the
  counted one took a quarter to a third of a training step.

So one seed means one mask on one backend. The probability is a multiple of 2^-16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16
INT64 = (-(2**63), 2**63 - 1)
_WORD = 0xFFFFFFFF


def threshold(probability: float) -> int:
    """How many of the 16-bit numbers drop an entry."""
    return min(round(probability * LEVELS), LEVELS - 1)


def kept_scale(probability: float) -> float:
    """What the kept entries are multiplied with, so that the mean stays."""
    return LEVELS / (LEVELS - threshold(probability))


def dropout_mask(seed: Tensor, probability: float, experts: Tensor, width: int) -> Tensor:
    """The counted mask of a batch, [tokens, k, width], entries 0 or 1, fp32.

    Args:
        seed: one int64, on the device where the mask is made.
        experts: [tokens, k], the tokens' experts, of any integer dtype: counters are multiplied in 64 bits.
    """
    tokens, slots = experts.shape
    shape = (tokens, slots, -(-width // 8))
    octets = torch.arange(shape[2], device=seed.device).expand(shape)
    rows = torch.arange(tokens, device=seed.device)[:, None, None].expand(shape)
    words = torch.stack(_philox(seed.reshape(()), octets, rows, experts.long()[:, :, None].expand(shape)), dim=-1)
    numbers = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(2)  # [tokens, k, width or a few more]
    return (numbers[:, :, :width] >= threshold(probability)).to(torch.float32)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 of counters (c0, c1, c2, 0): four words in 0..2^32 - 1, as int64."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        # 64-bit products wrap, and the bits that are read are right all the same.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((b >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def drop(x: Tensor, probability: float) -> Tensor:
    """Give x with dropout on it, by the device's generator: `F.dropout`, but on a CPU with fewer random bits."""
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    words = torch.randint(*INT64, (1, -(-x.numel() // 4)), device=x.device)
    return x * _kept(words, probability, x.new_empty(1, x.numel())).view(x.shape).mul_(kept_scale(probability))


class DrawnMask:
    """The drawn mask of a batch on a CPU, block after block.

    Args:
        probability: of dropping an entry.
        seed: one int64, of which the generator takes the lower 32 bits.
    """

    def __init__(self, probability: float, seed: Tensor) -> None:
        self.generator, self.probability = torch.Generator("cpu").manual_seed(int(seed)), probability

    def draw(self, out: Tensor) -> Tensor:
        """Draw for so many next tokens as ``out`` [b, F] has rows, and write entries 0 or 1 to it."""
        shape = (out.shape[0], -(-out.shape[1] // 4))
        return _kept(torch.randint(*INT64, shape, generator=self.generator, device="cpu"), self.probability, out)


def _kept(words: Tensor, probability: float, out: Tensor) -> Tensor:
    """Write 0, with ``probability``, or 1 to every entry of ``out`` [b, F], by a quarter of a random int64 each.
    `F.dropout` takes a random double for each, six times as long.
    """
    numbers = words.view(torch.int16)[:, : out.shape[1]]  # [b, F]
    # To its own dtype, and a cast, would take eight times as long.
    return torch.ge(numbers, threshold(probability) - LEVELS // 2, out=out)
