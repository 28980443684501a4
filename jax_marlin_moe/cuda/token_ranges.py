"""Programs for ranges of token counts, so that prompts of any length share a few of them.

A program for many tokens takes seconds to compile, and hardly depends on how many there are: the grid and the lists
have room for the most of a range, and the kernels that count tokens get the number at run time.
"""

# Few tokens are decoded, in a few batch sizes, where a program for exactly that many is fastest.
_MOST_EXACT = 64
MOST_EXACT_SLOTS = 128
# Beyond, the program of one number of tokens is small beside what it computes.
_MOST_SHARED = 1 << 16
_STEPS = 4  # from one power of two to the next


def most_tokens(tokens: int) -> int | None:
    """The most tokens of the range that has `tokens`, at most a quarter more; None where it is by itself."""
    if not _MOST_EXACT < tokens <= _MOST_SHARED:
        return None
    step = (1 << (tokens - 1).bit_length()) // (2 * _STEPS)
    return -(-tokens // step) * step
