"""What the words of two descriptions give away beside their meaning, before any model is loaded."""

from __future__ import annotations

SAME_SIZE = 1.5  # how much longer one description may be than the other
COMMON = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "in", "is", "it", "of", "or", "the", "to", "with", "you", "your", "always", "never", "not")
)


def lint(wanted: str | None, unwanted: str | None) -> list[str]:
    """What the form of two descriptions gives away beside their meaning, a sentence each."""
    if not wanted or not unwanted:
        return []
    notes = []
    sizes = [len(text.split()) for text in (wanted, unwanted)]
    if max(sizes) > SAME_SIZE * min(sizes):
        notes.append(f"wanted has {sizes[0]} words and unwanted {sizes[1]}: alike in length, they'd differ in meaning alone.")
    sentences = [sum(text.count(mark) for mark in ".!?") for text in (wanted, unwanted)]
    if sentences[0] != sentences[1]:
        notes.append(f"wanted has {sentences[0]} sentences and unwanted {sentences[1]}: the same number keeps the contrast clean.")
    first, second = (text.split()[:2] for text in (wanted.lower(), unwanted.lower()))
    if first[0] != second[0]:
        notes.append(
            f"wanted begins with {wanted.split()[0]!r} and unwanted with {unwanted.split()[0]!r}: begin both alike, such as You are …"
        )
    words, others = ({w.strip(".,;:!?\"'") for w in text.lower().split()} - COMMON for text in (wanted, unwanted))
    if words == others:
        notes.append("both descriptions use the same words: say the opposite in other words, since a small model overlooks a not.")
    return notes
