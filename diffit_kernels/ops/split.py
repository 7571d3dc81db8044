"""How samples are cut into chunks, one program each, so that a GPU is filled evenly."""

import functools

# Of the GPUs that stand for their families: A100, RTX 3090, RTX 4090, H100 and H200, B200, RTX
# 5090. A GPU with another number is filled a little less evenly, and no less correctly.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
OVERHEAD = 2  # what a chunk costs beyond its rows, counted in rows


def multiprocessors(capability: int) -> int:
    """Of a GPU of this compute capability."""
    return MULTIPROCESSORS[max(known for known in MULTIPROCESSORS if known <= capability)]


@functools.lru_cache(maxsize=4096)
def chunks(programs: int, samples: int, rows: int, least: int) -> int:
    """Chunks per sample, each of at least ``least`` rows, where ``programs`` run at once.

    As many as all run at once, or more, up to four times, where that ends a tenth sooner. With 528
    programs, 64 samples of 256 rows are cut into 8 chunks (one round of 32 rows), 200 samples into
    5 (two rounds of 52, not one of 128).
    """
    most = max(1, rows // least)
    once = max(1, min(most, programs // max(samples, 1)))

    def ends(number: int) -> int:
        return -(-samples * number // programs) * (-(-rows // number) + OVERHEAD)

    numbers = range(once, min(most, 4 * once) + 1)
    soonest = min(map(ends, numbers))
    return next(number for number in numbers if ends(number) <= 1.1 * soonest)
