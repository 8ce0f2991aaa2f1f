"""The policies once more, as their papers tell them: lists, and no thought of speed.

Each takes a block's number and says whether it was there. What a policy of the project
learns at its first eviction, how much room there is, these are told.
"""

from __future__ import annotations

from collections.abc import Callable

Access = Callable[[int], bool]


def fifo(room: int) -> Access:
    queue: list[int] = []

    def access(block: int) -> bool:
        if block in queue:
            return True
        if len(queue) == room:
            queue.pop(0)
        queue.append(block)
        return False

    return access


def lru(room: int) -> Access:
    queue: list[int] = []

    def access(block: int) -> bool:
        hit = block in queue
        if hit:
            queue.remove(block)
        elif len(queue) == room:
            queue.pop(0)
        queue.append(block)
        return hit

    return access


def clock(room: int) -> Access:
    queue: list[int] = []
    used: set[int] = set()

    def access(block: int) -> bool:
        if block in queue:
            used.add(block)
            return True
        if len(queue) == room:
            while queue[0] in used:
                used.remove(queue[0])
                queue.append(queue.pop(0))
            queue.pop(0)
        queue.append(block)
        return False

    return access


def sieve(room: int) -> Access:
    queue: list[int] = []
    used: set[int] = set()
    hand = 0

    def access(block: int) -> bool:
        nonlocal hand
        if block in queue:
            used.add(block)
            return True
        if len(queue) == room:
            while queue[hand] in used:
                used.remove(queue[hand])
                hand = (hand + 1) % room
            queue.pop(hand)
            if hand == room - 1:
                hand = 0
        queue.append(block)
        return False

    return access


def lfu(room: int) -> Access:
    held: list[int] = []  # By when they reached their count.
    uses: dict[int, int] = {}

    def access(block: int) -> bool:
        hit = block in held
        if hit:
            held.remove(block)
            uses[block] += 1
        else:
            if len(held) == room:
                held.remove(min(held, key=lambda b: uses[b]))
            uses[block] = 1
        held.append(block)
        return hit

    return access


def two_q(room: int) -> Access:
    passing: list[int] = []
    gone: list[int] = []
    main: list[int] = []

    def access(block: int) -> bool:
        if block in main:
            main.remove(block)
            main.append(block)
            return True
        if block in passing:
            return True
        if len(passing) + len(main) == room:
            if len(passing) > room / 4 or not main:
                gone.append(passing.pop(0))
                del gone[: max(len(gone) - room // 2, 0)]
            else:
                main.pop(0)
        if block in gone:
            gone.remove(block)
            main.append(block)
        else:
            passing.append(block)
        return False

    return access


def arc(c: int) -> Access:
    """Figure 4 of the paper."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p = 0.0

    def replace(block: int) -> None:
        if t1 and (len(t1) > p or (block in b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    def access(block: int) -> bool:
        nonlocal p
        for there in (t1, t2):
            if block in there:
                there.remove(block)
                t2.append(block)
                return True
        if block in b1:
            p = min(p + max(len(b2) / len(b1), 1), c)
            replace(block)
            b1.remove(block)
            t2.append(block)
        elif block in b2:
            p = max(p - max(len(b1) / len(b2), 1), 0)
            replace(block)
            b2.remove(block)
            t2.append(block)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(block)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(block)
            t1.append(block)
        return False

    return access


def s3_fifo(room: int) -> Access:
    small: list[int] = []
    main: list[int] = []
    gone: list[int] = []
    uses: dict[int, int] = {}

    def evict() -> None:
        while small and (len(small) > room * 0.1 or not main):
            block = small.pop(0)
            if uses[block] < 2:
                gone.append(block)
                del gone[: max(len(gone) - int(room * 0.9), 0)]
                return
            uses[block] = 0
            main.append(block)
        while True:
            block = main.pop(0)
            if not uses[block]:
                return
            uses[block] -= 1
            main.append(block)

    def access(block: int) -> bool:
        if block in small or block in main:
            uses[block] = min(uses[block] + 1, 3)
            return True
        if len(small) + len(main) == room:
            evict()
        uses[block] = 0
        if block in gone:
            gone.remove(block)
            main.append(block)
        else:
            small.append(block)
        return False

    return access


def lirs(room: int) -> Access:
    stack: list[int] = []
    kept: set[int] = set()
    passing: list[int] = []
    gone: list[int] = []
    most = 0

    def prune() -> None:
        while stack and stack[0] not in kept:
            block = stack.pop(0)
            if block in gone:
                gone.remove(block)

    def fit() -> None:
        while most and len(kept) > most:
            prune()
            block = stack.pop(0)
            kept.remove(block)
            passing.append(block)
        prune()

    def access(block: int) -> bool:
        nonlocal most
        hit = block in kept or block in passing
        again = block in stack and (hit or block in gone)
        if not hit and len(kept) + len(passing) == room:
            most = max(room - max(int(room * 0.01), 1), 1)
            fit()
            victim = passing.pop(0) if passing else -1
            if victim < 0:
                kept.remove(stack.pop(0))
                prune()
            elif victim in stack:
                gone.append(victim)
                while len(gone) > room:
                    stack.remove(gone.pop(0))
            again = again and block in stack
        if block in gone:
            gone.remove(block)
        if block in stack:
            stack.remove(block)
        stack.append(block)
        if block in kept:
            prune()
        elif again or not most:
            if block in passing:
                passing.remove(block)
            kept.add(block)
            fit()
        else:
            if block in passing:
                passing.remove(block)
            passing.append(block)
        return hit

    return access


def gdsf(room: int) -> Access:
    """All blocks cost the same here."""
    score: dict[int, float] = {}
    uses: dict[int, int] = {}
    since: dict[int, int] = {}
    level = 0.0
    now = 0

    def access(block: int) -> bool:
        nonlocal level, now
        now += 1
        hit = block in score
        if not hit:
            if len(score) == room:
                victim = min(score, key=lambda b: (score[b], since[b]))
                level = score.pop(victim)
            uses[block] = 0
        uses[block] += 1
        score[block] = level + uses[block]
        since[block] = now
        return hit

    return access


MODELS: dict[str, Callable[[int], Access]] = {
    "fifo": fifo,
    "lru": lru,
    "clock": clock,
    "sieve": sieve,
    "lfu": lfu,
    "2q": two_q,
    "arc": arc,
    "s3-fifo": s3_fifo,
    "lirs": lirs,
    "gdsf": gdsf,
}
