"""The life of one replica of a block: every state, and every way between them.

Whatever may happen to a replica is a row of `TRANSITIONS`; whatever is not a row
raises `IllegalTransition` and changes nothing. Nothing else in the project sets a
replica's state.

    client writes          WRITING ---commit---> READY
      it gives up             |---abort---> GONE
      it runs out of time     `---expire--> QUARANTINED --writer_gone--> GONE
    a transfer fills       FILLING ---filled---> READY
      it fails                |---fill_failed---> GONE
      nobody wants it         `---abandon---> ABANDONED --fill_failed--> GONE
                                                  `------filled--> DOOMED
    it is dropped          READY ---drop---> GONE
      while it is in use      |---doom---> DOOMED --unpinned--> GONE
      from a storage tier     |---leave--> LEAVING --left--> GONE   (DOOMED too)
      it is damaged           `---damage-> DAMAGED                  (DOOMED too)

Only READY replicas are found by lookups. QUARANTINED keeps its slot because a
client that is late may still be writing into it: the slot is not reused before
that client is gone or gives it up. DAMAGED keeps its slot for good, so that bad
media is not written again.
"""

from __future__ import annotations

import enum

from kvstore.errors import IllegalTransition


class State(enum.Enum):
    # By identity, as they compare: Enum's own is computed in Python, and every step
    # of every block looks a pair of these up.
    __hash__ = object.__hash__

    WRITING = "writing"
    FILLING = "filling"
    READY = "ready"
    DOOMED = "doomed"
    ABANDONED = "abandoned"
    QUARANTINED = "quarantined"
    LEAVING = "leaving"
    DAMAGED = "damaged"
    GONE = "gone"


class Event(enum.Enum):
    __hash__ = object.__hash__

    COMMIT = "commit"
    ABORT = "abort"
    EXPIRE = "expire"
    WRITER_GONE = "writer_gone"
    FILLED = "filled"
    FILL_FAILED = "fill_failed"
    ABANDON = "abandon"
    DROP = "drop"
    DOOM = "doom"
    UNPINNED = "unpinned"
    LEAVE = "leave"
    LEFT = "left"
    DAMAGE = "damage"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WRITING, Event.COMMIT): State.READY,
    (State.WRITING, Event.ABORT): State.GONE,
    (State.WRITING, Event.WRITER_GONE): State.GONE,
    (State.WRITING, Event.EXPIRE): State.QUARANTINED,
    (State.QUARANTINED, Event.WRITER_GONE): State.GONE,
    (State.QUARANTINED, Event.ABORT): State.GONE,
    (State.FILLING, Event.FILLED): State.READY,
    (State.FILLING, Event.FILL_FAILED): State.GONE,
    (State.FILLING, Event.ABANDON): State.ABANDONED,
    (State.ABANDONED, Event.FILLED): State.DOOMED,
    (State.ABANDONED, Event.FILL_FAILED): State.GONE,
    (State.READY, Event.DROP): State.GONE,
    (State.READY, Event.DOOM): State.DOOMED,
    (State.DOOMED, Event.UNPINNED): State.GONE,
    (State.READY, Event.LEAVE): State.LEAVING,
    (State.DOOMED, Event.LEAVE): State.LEAVING,
    (State.LEAVING, Event.LEFT): State.GONE,
    (State.READY, Event.DAMAGE): State.DAMAGED,
    (State.DOOMED, Event.DAMAGE): State.DAMAGED,
}

INITIAL_STATES = frozenset({State.WRITING, State.FILLING})


def next_state(state: State, event: Event) -> State:
    """The state after `event`; raises `IllegalTransition` where there is none."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"a replica that is {state.value} cannot {event.value}") from None
