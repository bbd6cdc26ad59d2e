"""Whether two tokenizers number the same tokens alike, which is what distilling over a vocabulary rests on.

Two heads of one height are no proof: vocabularies of one size can hold other tokens, or the same in another order. A loss over
them would be computed without complaint and teach nonsense. So what is compared is the tokens themselves.
"""

from __future__ import annotations

from typing import Any


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """How many leading ids mean the same to both tokenizers: what both heads are cut to (``vocab_size`` of the losses).

    student, teacher: tokenizers of transformers; ``get_vocab()`` is read, added tokens included, and their classes do not matter.
    Ids that neither has a token for count where they stand below the last shared one; the padding of a head is no part of this.

    Tokens that only one of the two has are accepted behind all that both have, as added special tokens are. Then they are cut
    off, and sequences that contain one cannot be given to the other model.

    Raises ValueError where a token has two ids, an id has two tokens, or a token that only one has stands among the shared ones:
    with the number of such tokens and the first of them.
    """
    ids: dict[str, dict[str, int]] = {"student": student.get_vocab(), "teacher": teacher.get_vocab()}
    ours, theirs = ids["student"], ids["teacher"]
    both = ours.keys() & theirs.keys()
    if not both:
        raise ValueError(f"the tokenizers of student ({len(ours):,} tokens) and teacher ({len(theirs):,}) have no token in common")
    size = 1 + max(max(ours[token], theirs[token]) for token in both)
    meant = {ours[token] for token in both}

    # (id, what is wrong) for each token
    wrong = [
        (min(ours[token], theirs[token]), f"{token!r} is {ours[token]} in the student's and {theirs[token]} in the teacher's")
        for token in both
        if ours[token] != theirs[token]
    ]
    for name, other in (("student", "teacher"), ("teacher", "student")):
        taken = {number: token for token, number in ids[other].items()}
        for token, number in ids[name].items():
            if token in both or number in meant:  # in meant: a second spelling of a token that both have
                continue
            if number in taken:
                wrong.append((number, f"{number} is {token!r} in the {name}'s and {taken[number]!r} in the {other}'s"))
            elif number < size:
                wrong.append(
                    (number, f"{token!r} is {number} in the {name}'s and in the {other}'s not there, before shared tokens")
                )
    if wrong:
        raise ValueError(
            f"the tokenizers of student ({len(ours):,} tokens) and teacher ({len(theirs):,}) disagree on {len(wrong):,} of their "
            f"tokens, the first: {min(wrong)[1]}; a student learns only from a teacher whose tokens have the same ids"
        )
    return size
