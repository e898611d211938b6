"""Top-k softmax routing in one launch: the router's product, the softmax, the choice, and the statistics."""

import triton
import triton.language as tl


@triton.jit
def exact_dot(x, router):
    """x router, accurate as in fp32, whatever the two dtypes are."""
    if x.dtype == router.dtype:  # two fp16 or bf16 numbers have an exact product in fp32
        acc = tl.dot(x, router, input_precision="ieee")
    elif x.dtype == tl.float32:
        acc = tl.dot(x, router.to(tl.float32), input_precision="ieee")
    else:
        # Three bf16 numbers hold the 24 bits of an fp32 one, and two those of an fp16 one: so all products are exact,
        # on matrix units that do not multiply fp32.
        wide = router.to(tl.float32)
        high = wide.to(tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        x_high = x.to(tl.float32).to(tl.bfloat16)
        acc = tl.dot(x_high, low)
        if x.dtype == tl.float16:
            x_low = (x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(x_low, low, acc)
            acc = tl.dot(x_low, middle, acc)
            acc = tl.dot(x_low, high, acc)
        acc = tl.dot(x_high, middle, acc)
        acc = tl.dot(x_high, high, acc)
    return acc


@triton.jit
def project(
    x_ptr,
    router_ptr,
    tokens,
    experts,
    num_tokens,
    hidden,
    x_stride,
    router_stride,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x R^T of a block of tokens, [BLOCK_N, BLOCK_E] fp32.

    Matrix units round every sum that they add up down, so each block of columns gets a sum of its own. A token on its
    own is no work for them: its products are added up lane by lane, and nothing waits for the product before.
    """
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride  # [BLOCK_N, 1]
    router_rows = router_ptr + experts.to(tl.int64)[:, None] * router_stride  # [BLOCK_E, 1]
    lanes = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in tl.range(0, hidden, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K))[None, :]
        inside = columns < hidden
        x = tl.load(x_rows + columns, mask=(tokens < num_tokens)[:, None] & inside, other=0.0)
        router = tl.load(router_rows + columns, mask=(experts < NUM_EXPERTS)[:, None] & inside, other=0.0)
        if BLOCK_N == 1:
            lanes += x.to(tl.float32) * router.to(tl.float32)
        else:
            acc += exact_dot(x, tl.trans(router))
    if BLOCK_N == 1:
        acc += tl.sum(lanes, axis=1)[None, :]
    return acc


@triton.jit
def softmax(logits, real):
    """Softmax over the lanes of ``real`` experts; a row with NaN, +inf or nothing but -inf is NaN throughout."""
    shifted = logits - tl.max(tl.where(real, logits, -float("inf")), axis=1)[:, None]
    exponentials = tl.where(real, tl.exp(shifted), 0.0)
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def choose(logits, probabilities, experts, TOP_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """The TOP_K largest logits of each row, the lower index first among equals.

    Gives the chosen probabilities and experts, [BLOCK_N, BLOCK_S] each, and whether each expert is chosen,
    [BLOCK_N, BLOCK_E]. ``experts`` is -1 in lanes beyond the real experts: they are no candidates.
    """
    slots = tl.arange(0, BLOCK_S)[None, :]
    # NaN compares with nothing: as -inf it is chosen last, and the experts stay distinct whatever a row holds.
    scores = tl.where(logits == logits, logits, -float("inf"))
    rank = tl.full(logits.shape, TOP_K, tl.int32)  # the slot that an expert got; TOP_K while it has none
    values = tl.zeros([logits.shape[0], BLOCK_S], tl.float32)
    chosen = tl.zeros([logits.shape[0], BLOCK_S], tl.int32)
    for slot in tl.range(0, TOP_K):
        free = (experts >= 0) & (rank == TOP_K)
        best = tl.max(tl.where(free, scores, -float("inf")), axis=1)[:, None]
        index = tl.min(tl.where(free & (scores == best), experts, logits.shape[1]), axis=1)[:, None]
        rank = tl.where(experts == index, slot, rank)
        value = tl.sum(tl.where(experts == index, probabilities, 0.0), axis=1)[:, None]
        values = tl.where(slots == slot, value, values)
        chosen = tl.where(slots == slot, index, chosen)
    return values, chosen, rank < TOP_K


@triton.jit(do_not_specialize=["num_tokens"])
def route_forward(
    x_ptr,  # [N, D]
    router_ptr,  # [n, D]
    offset_ptr,  # [N, n]
    mask_ptr,  # [N]
    logits_ptr,  # [N, n] fp32
    weights_ptr,  # [N, k] fp32
    experts_ptr,  # [N, k] int32
    counts_ptr,  # [programs, n] fp32
    mass_ptr,  # [programs, n] fp32
    tickets_ptr,  # [ceil(N / TICKET_TOKENS)] int32
    num_tokens,
    hidden,
    x_stride,
    router_stride,
    offset_stride,
    HAS_X: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_MASK: tl.constexpr,
    STORE_LOGITS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STATISTICS: tl.constexpr,  # 0 none, 1 top-k, 2 full
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TICKET_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 1, or a multiple of TICKET_TOKENS
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,  # n rounded up to a power of two, and where BLOCK_N is not 1 to 16 at least
    BLOCK_S: tl.constexpr,  # k rounded up to a power of two
):
    """Everything that routing knows of BLOCK_N tokens, from their states or their logits."""
    program = tl.program_id(0)
    tokens = program * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_E)
    rows = tokens.to(tl.int64)[:, None]
    real = (lanes < NUM_EXPERTS)[None, :]
    valid = (tokens < num_tokens)[:, None] & real
    first = program * BLOCK_N
    TICKETS: tl.constexpr = (BLOCK_N + TICKET_TOKENS - 1) // TICKET_TOKENS
    tickets = first // TICKET_TOKENS + tl.arange(0, TICKETS)
    mine = (first % TICKET_TOKENS == 0) & (tickets < tl.cdiv(num_tokens, TICKET_TOKENS))
    tl.store(tickets_ptr + tickets, tl.zeros_like(tickets), mask=mine)

    logits = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if HAS_X:
        logits = project(
            x_ptr, router_ptr, tokens, lanes, num_tokens, hidden, x_stride, router_stride,
            NUM_EXPERTS, BLOCK_N, BLOCK_E, BLOCK_K,
        )  # fmt: skip
    if HAS_OFFSET:
        logits += tl.load(offset_ptr + rows * offset_stride + lanes[None, :], mask=valid, other=0.0).to(tl.float32)
    if STORE_LOGITS:
        tl.store(logits_ptr + rows * NUM_EXPERTS + lanes[None, :], logits, mask=valid)

    probabilities = softmax(logits, real)
    values, chosen, taken = choose(logits, probabilities, tl.where(real, lanes[None, :], -1), TOP_K, BLOCK_S)
    slots = tl.arange(0, BLOCK_S)[None, :]
    stored = (tokens < num_tokens)[:, None] & (slots < TOP_K)
    weights = values
    if NORMALIZE:
        weights = values / tl.sum(values, axis=1)[:, None]
    tl.store(weights_ptr + rows * TOP_K + slots, weights, mask=stored)
    tl.store(experts_ptr + rows * TOP_K + slots, chosen, mask=stored)

    if STATISTICS > 0:
        counted = valid
        if HAS_MASK:
            counted &= (tl.load(mask_ptr + tokens, mask=tokens < num_tokens, other=0) != 0)[:, None]
        summed = counted
        if STATISTICS == 1:
            summed = counted & taken
        # By selection, not by a product: what padding holds may be NaN.
        counts = tl.sum(tl.where(counted & taken, 1.0, 0.0), axis=0)
        mass = tl.sum(tl.where(summed, probabilities, 0.0), axis=0)
        partial = program.to(tl.int64) * NUM_EXPERTS + lanes
        tl.store(counts_ptr + partial, counts, mask=lanes < NUM_EXPERTS)
        tl.store(mass_ptr + partial, mass, mask=lanes < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward(
    d_logits_ptr,  # [N, n] fp32
    d_weights_ptr,  # [N, k] fp32
    d_mass_ptr,  # [n] fp32
    logits_ptr,  # [N, n]
    experts_ptr,  # [N, k] int32
    mask_ptr,  # [N]
    total_ptr,  # [N, n] fp32
    num_tokens,
    logits_stride,
    HAS_D_LOGITS: tl.constexpr,
    HAS_D_WEIGHTS: tl.constexpr,
    HAS_D_MASS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STATISTICS: tl.constexpr,  # 0 none, 1 top-k, 2 full
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # n rounded up to a power of two, 16 at least
):
    """The whole gradient of BLOCK_N tokens' logits: through weights and mass, and what arrives directly."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_E)[None, :]
    inside = tokens < num_tokens
    rows = tokens.to(tl.int64)
    valid = inside[:, None] & (lanes < NUM_EXPERTS)
    logits = tl.load(logits_ptr + rows[:, None] * logits_stride + lanes, mask=valid, other=0.0).to(tl.float32)
    probabilities = softmax(logits, lanes < NUM_EXPERTS)

    d_chosen = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)  # d_weights at the experts they belong to
    taken = tl.zeros([BLOCK_N, BLOCK_E], tl.int32)
    for slot in tl.range(0, TOP_K):
        expert = tl.load(experts_ptr + rows * TOP_K + slot, mask=inside, other=BLOCK_E)[:, None]
        taken = tl.where(lanes == expert, 1, taken)
        if HAS_D_WEIGHTS:
            upstream = tl.load(d_weights_ptr + rows * TOP_K + slot, mask=inside, other=0.0)[:, None]
            d_chosen = tl.where(lanes == expert, upstream, d_chosen)

    total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if HAS_D_LOGITS:
        total += tl.load(d_logits_ptr + rows[:, None] * NUM_EXPERTS + lanes, mask=valid, other=0.0)
    d_probabilities = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if HAS_D_WEIGHTS:
        if NORMALIZE:  # renormalised weights are the softmax over the chosen experts alone
            chosen = tl.where(taken > 0, probabilities, 0.0)
            weights = chosen / tl.sum(tl.where(inside[:, None], chosen, 1.0), axis=1)[:, None]
            total += weights * (d_chosen - tl.sum(d_chosen * weights, axis=1)[:, None])
        else:
            d_probabilities += d_chosen
    if HAS_D_MASS:
        counted = valid
        if HAS_MASK:
            counted &= (tl.load(mask_ptr + tokens, mask=inside, other=0) != 0)[:, None]
        if STATISTICS == 1:
            counted &= taken > 0
        d_mass = tl.load(d_mass_ptr + lanes, mask=lanes < NUM_EXPERTS, other=0.0)
        d_probabilities += tl.where(counted, d_mass, 0.0)
    if HAS_D_MASS or (HAS_D_WEIGHTS and not NORMALIZE):
        total += probabilities * (d_probabilities - tl.sum(d_probabilities * probabilities, axis=1)[:, None])
    tl.store(total_ptr + rows[:, None] * NUM_EXPERTS + lanes, total, mask=valid)
