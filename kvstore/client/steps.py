"""What a flow asks of its driver.

Every operation of the client is a *flow*: a generator that yields steps and is
sent their results. It says what happens in which order and knows nothing of
threads, event loops or gRPC; a synchronous and an asynchronous driver perform
the same steps. A step that fails is thrown into the flow as a typed error.

A flow that holds something gives it back in a `finally` that may itself yield
steps, so drivers throw whatever interrupts a step (cancellation included) into
the flow and go on driving it until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvstore.client.lines import Lines

T = TypeVar("T")


class Call(NamedTuple):
    """One unary RPC; its result is the response message.

    `session` is empty for a call without one. `lines`: those of the session, where the
    call is made on one of them; otherwise it goes over gRPC, and with `wait_for_ready`
    waits, within its time, for the server to be reachable.

    A call that grants something has an `undo`: from its response, the call that
    gives the grant back; from None, where the response was not heard, whatever else
    gives it back. A driver uses it whenever the flow gets no response although the
    server may have granted something: the call was abandoned, or it raises
    `Unavailable`.
    """

    method: str
    request: Message
    session: bytes
    timeout_s: float
    wait_for_ready: bool = False
    undo: Callable[[Any | None], Call | None] | None = None
    lines: Lines | None = None

    def unheard(self) -> None:
        """Nobody heard the response to a call that the server may have done."""
        if self.undo is not None:
            self.undo(None)


class Begin(NamedTuple):
    """Send a call and go on; the result stands for it, to be given to `End` or
    `Drop`, once."""

    call: Call


class End(NamedTuple):
    """Wait for a call that was begun; its result is the response message."""

    begun: Any


class Drop(NamedTuple):
    """Nobody wants the answer of a call that was begun, nor waits for it. What it grants
    is given back when it comes. No result."""

    begun: Any


class ReadStream(NamedTuple):
    """A Read RPC: `sink` gets each piece of data as it comes. No result."""

    request: Message
    session: bytes
    timeout_s: float
    sink: Callable[[memoryview], None]


class WritePiece(NamedTuple):
    """At most 1 MiB of one block, and the slot (the server's id) it goes to."""

    slot: int
    data: memoryview


class WriteStream(NamedTuple):
    """A Write RPC of all `pieces`. No result."""

    pieces: Iterable[WritePiece]
    session: bytes
    timeout_s: float


class SessionStream(Protocol):
    """An open OpenSession RPC, which keeps its session alive."""

    def alive(self) -> bool: ...
    def cancel(self) -> None: ...


class OpenSession(NamedTuple):
    """Open a session over gRPC; the result is (session id, `SessionStream`)."""

    timeout_s: float


class Work(NamedTuple):
    """Call `run` where it may block; its result is the step's.

    A driver never abandons work that has begun: it may be writing into memory
    that is given to others once the flow goes on.
    """

    run: Callable[[], Any]


class Connect(NamedTuple):
    """Get a link to the server, one flow at a time; the result is the `Link`."""

    timeout_s: float


Step = Call | Begin | End | Drop | ReadStream | WriteStream | OpenSession | Work | Connect
Flow = Generator[Step, Any, T]
