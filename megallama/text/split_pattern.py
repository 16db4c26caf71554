"""The split patterns of the published tokenizers, and whether one that a file names can be trusted with text.

tiktoken gives the pattern to a regular-expression engine in Rust, which panics at some patterns, backtracks without end
at others, and passes over text that none of its matches covers. So a pattern that is not one of ours is tried first, in
a process of its own.
"""

from __future__ import annotations

import functools
import json
import string
import subprocess
import sys

from megallama.errors import UserError

R50K_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_BLANKS = r"|\s+(?!\S)|\s+"

# Llama 3 publishes its ranks as `tokenizer.model`; pattern and special tokens stand in its code only
# (llama-models, models/llama3/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken's engine gives what looks neither ahead nor back to an automaton, and steps through the rest itself, branch
# by branch. With all such branches in one group, whose matches are the same, nearly every match is one run of the
# automaton: 1.3 to 2 times the text per second. `x++` and `x+` match the same where nothing follows in their branch.
_AUTOMATON_FIRST = {
    R50K_PATTERN: r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s",
    LLAMA3_PATTERN: f"(?:{LLAMA3_PATTERN.removesuffix(_BLANKS)}){_BLANKS}",
    CL100K_PATTERN: (
        r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n])"
        r"|\s+(?!\S)|\s"
    ),
    O200K_PATTERN: f"(?:{O200K_PATTERN.removesuffix(_BLANKS)}){_BLANKS}",
}

LONGEST_PATTERN = 10_000
TRIAL_SECONDS = 10.0

_CHARACTERS = string.printable + "éÉ日٣½\u00a0\u2028\u0301🙂"
_WORDS = ("ab", "aA", "a1", "a ", " \n", "\r\n", "'s", "a!", "1,")
# Runs on which nested repetitions backtrack most: of one character, and ending in another.
TRIAL_TEXTS = [
    "It's 12,345.67 o'clock:\r\n\n\tnaïve CAFÉs 日本語 🙂 \x00\x7f\n  x = y+1  ",
    *(character * 200 for character in _CHARACTERS),
    *(character * 200 + end for character in _CHARACTERS for end in "!z0\n" if end != character),
    *(word * 1000 for word in _WORDS),
]

_TRIAL = """
import json, sys, tiktoken
pattern, texts = json.load(sys.stdin)

def refuse(reason):
    print(reason)
    sys.exit(1)

try:
    encoding = tiktoken.Encoding(
        "trial", pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
except ValueError as error:
    refuse(f"is not legal ({error})")
for text in texts:
    if bytes(encoding.encode_ordinary(text)) != text.encode():
        refuse(f"passes over a part of {text[:40]!r}")
"""


def automaton_first(pattern: str) -> str:
    """What splits any text as `pattern` does, in less time where that is a published pattern."""
    return _AUTOMATON_FIRST.get(pattern, pattern)


def check_pattern(pattern: str) -> None:
    """UserError, as a clause, if `pattern` is illegal, slow, or does not cover all text."""
    if pattern not in _AUTOMATON_FIRST and (fault := _fault(pattern)):
        raise UserError(f"the pattern {pattern[:60]!r} {fault}")


@functools.lru_cache(maxsize=64)
def _fault(pattern: str) -> str:
    """What is wrong with the pattern, or nothing; the answer to one pattern is always the same."""
    if len(pattern) > LONGEST_PATTERN:
        return f"has more than {LONGEST_PATTERN} characters"
    words = [sys.executable, "-c", _TRIAL]
    texts = json.dumps([pattern, TRIAL_TEXTS])
    try:
        tried = subprocess.run(words, input=texts, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {TRIAL_SECONDS:.0f} s for a page of text"
    return (tried.stdout.strip() or "backtracks without end, or breaks tiktoken") if tried.returncode else ""
