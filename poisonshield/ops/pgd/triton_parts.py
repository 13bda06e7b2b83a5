"""What the Triton kernels of PGD share: places, the space of x_adv, storing, random numbers.

A program takes BLOCK elements of one sample, in the order of memory. Where channels differ, an element's channel
follows from its place, whatever the order of dimensions: (place // channel_step) % channels. Random numbers are those
of the row-major order: for channels-last, place i is element (i % columns) * (count // columns) + i // columns.
"""

import triton
import triton.language as tl

from poisonshield.ops.trigonometry import cosine_of_turns


@triton.jit
def places(count, chunks, BLOCK: tl.constexpr):
    """The sample, the places in it that a program takes, which of them exist, and where they lie."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    return b, i, i < count, b.to(tl.int64) * count + i


@triton.jit
def of_sample(each_ptr, number, b, EACH: tl.constexpr):
    """The number of sample b, float32: its own if EACH, else that of all."""
    if EACH:
        return tl.load(each_ptr + b).to(tl.float32)
    else:
        return tl.full([], number, tl.float32)


@triton.jit
def statistics(mean_ptr, std_ptr, i, inside, channels, channel_step, HAS_STD: tl.constexpr):
    """mean and std at each place; 0 and 1 without them."""
    if HAS_STD:
        c = tl.where(inside, i // channel_step % channels, 0)
        return tl.load(mean_ptr + c), tl.load(std_ptr + c)
    else:
        return 0.0, 1.0


@triton.jit
def limits(mean, std, clip_low, clip_high, HAS_STD: tl.constexpr):
    """The clip's two ends in the space of x_adv."""
    low, high = clip_low * 1.0, clip_high * 1.0
    if HAS_STD:
        low, high = tl.div_rn(low - mean, std), tl.div_rn(high - mean, std)
    return low, high


@triton.jit
def scaled(v, std, HAS_STD: tl.constexpr):
    """v in pixel units, in the space of x_adv."""
    if HAS_STD:
        v = tl.div_rn(v + std * 0, std)
    return v


@triton.jit
def original(clean_ptr, at, inside, mean, std, HAS_STD: tl.constexpr):
    """clean in the space of x_adv, float32."""
    clean = tl.load(clean_ptr + at, mask=inside, other=0).to(tl.float32)
    if clean_ptr.dtype.element_ty == tl.uint8:
        clean = tl.div_rn(clean, tl.full(clean.shape, 255.0, tl.float32))
        if HAS_STD:
            clean = tl.div_rn(clean - mean, std)
    return clean


@triton.jit
def clip(v, low, high):
    """v within [low, high]; a NaN stays."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(g):
    """-1, 0 or 1 for each g; 0 for NaN."""
    return tl.where(g > 0, 1.0, 0.0) - tl.where(g < 0, 1.0, 0.0)


@triton.jit
def direction(g_ptr, mask_ptr, at, inside, std, HAS_STD: tl.constexpr, HAS_MASK: tl.constexpr, SIGN: tl.constexpr):
    """v, where to go, in pixel units: the gradient's sign or the gradient; 0 under the mask."""
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
    v = sign(g) if SIGN else scaled(g, std, HAS_STD)
    if HAS_MASK:
        v = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, v, 0.0)
    return v


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """v to the nearest number of x_adv's dtype, ties to even: bfloat16 by bits, as the interpreter would cut it off."""
    if dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(dtype)


@triton.jit
def neighbour(v, where, UP: tl.constexpr):
    """The next representable half precision number up or down, where asked."""
    bits = v.to(tl.int16, bitcast=True)
    wide = v.to(tl.float32)
    step = tl.where((wide > 0) == UP, 1, -1).to(tl.int16)  # a magnitude's bit pattern counts upwards
    smallest = tl.where(wide == 0, 1 if UP else -32767, 0).to(tl.int16)
    moved = tl.where(wide == 0, smallest, bits + step)
    return tl.where(where, moved, bits).to(v.dtype, bitcast=True)


@triton.jit
def store(x_ptr, mask_ptr, at, inside, new, clean, least, most, HAS_MASK: tl.constexpr, BALL: tl.constexpr):
    """new to x_adv, and clean where masked. Half precision never leaves [least, most]; in a ball, the side of clean."""
    if HAS_MASK:
        new = tl.where(tl.load(mask_ptr + at, mask=inside, other=1) != 0, new, clean)
    stored = rounded(new, x_ptr.dtype.element_ty)
    if x_ptr.dtype.element_ty != tl.float32:
        if BALL:
            least, most = tl.minimum(new, clean), tl.maximum(new, clean)
        stored = neighbour(stored, stored.to(tl.float32) > most, False)
        stored = neighbour(stored, stored.to(tl.float32) < least, True)
    tl.store(x_ptr + at, stored, mask=inside)


@triton.jit
def words(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, block, LATER: tl.constexpr):
    """Philox's four words of each block of sample b, in its stream or, if LATER, in the next one: see random.py."""
    sample = tl.load(ids_ptr + b).to(tl.uint64, bitcast=True)
    zero = block.to(tl.uint32) * 0
    stream = tl.load(stream_ptr)
    if LATER:
        stream += 1
    return tl.philox(
        tl.load(seed_ptr).to(tl.uint64, bitcast=True) ^ (sample >> 32),
        block.to(tl.uint32),
        zero + (sample & 0xFFFFFFFF).to(tl.uint32),
        zero + (tl.load(offset_ptr) & 0xFFFFFFFF).to(tl.uint32),
        zero + (stream & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def fraction(word):
    """The top 24 bits as a float in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def uniform(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, element, LATER: tl.constexpr):
    """The number of each element in [0, 1); four lanes draw the same words, and each takes its own."""
    element = element.to(tl.uint32)
    w0, w1, w2, w3 = words(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, element // 4, LATER)
    place = element % 4
    return fraction(tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3))))


@triton.jit
def normal(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, element, count):
    """Box-Muller: the first half of a sample's numbers are cosines, the second half sines of the same pairs."""
    pairs = (count + 1) // 2
    pair = tl.where(element < pairs, element, element - pairs)
    radius = tl.sqrt(-2.0 * tl.log(1.0 - uniform(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, pair, False)))
    turns = uniform(seed_ptr, offset_ptr, ids_ptr, stream_ptr, b, pairs + pair, False)
    return radius * cosine_of_turns(turns, tl.where(element < pairs, 0, 3))


@triton.jit
def element_of(i, count, columns, PERMUTED: tl.constexpr):
    """The element in row-major order at place i."""
    if PERMUTED:
        return i % columns * (count // columns) + i // columns
    else:
        return i


@triton.jit
def total(sums_ptr, b, chunks, NUMBERS: tl.constexpr, WHICH: tl.constexpr, PARTS: tl.constexpr):
    """The sum of number WHICH of all chunks of sample b, float64; each program adds them in the same order."""
    part = tl.arange(0, PARTS)
    found = tl.zeros([PARTS], tl.float64)
    start = chunks * 0
    while start < chunks:  # no `range`: Triton 3.6 interprets it by an index that numpy 2.5 refuses
        here = start + part < chunks
        at = sums_ptr + (b.to(tl.int64) * chunks + start + part) * NUMBERS + WHICH
        found += tl.load(at, mask=here, other=0)
        start += PARTS
    return tl.sum(found)
