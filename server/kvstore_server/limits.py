"""Bounds of what one caller may ask of the server at once."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 4 << 20
MAX_CHUNK_BYTES = 1 << 20
"""Of a block's bytes in one message of Read or Write."""

MAX_CHAINS = 1024
"""In one call."""
MAX_LAYOUTS = 256
"""Named by one chain."""
MAX_KEYS = 65536
"""In one call: keys over all chains, counted once for each layout of their chain;
or lease ids, or indices."""
MAX_BLOCKS = 1024
"""To reserve, commit or give back in one call. The server's one loop does nothing else
meanwhile, some 10 us for each."""

MAX_GPUS = 64
"""To name in one call."""

MAX_WAIT_MS = 60_000
MAX_METADATA_BYTES = 16 << 10

MAX_CALLS = 256
"""At a time on one connection."""
SPARE_CALLS = 512
"""Calls at a time over all connections, beyond streams."""
SESSION_STREAMS = 32
"""`Read` and `Write` of one session at a time."""
MAX_STREAMS = 128
"""Of all sessions: what they have in memory, unread, is about what lines may keep."""
WRITE_IDLE_S = 30.0
"""How long a `Write` may say nothing."""
WATCHES = 64
"""Who may watch the server's health, or have it describe itself, at a time."""

HANDSHAKE_MS = 5_000
"""How long a connection may take to begin with HTTP/2."""
CONNECTION_IDLE_MS = 300_000
"""How long one may stay without a call, a session's stream among these."""
KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000
MIN_CLIENT_PING_MS = 5_000

ATTACH_TIMEOUT_S = 5.0
"""How long a connection to the attach socket may stay silent before it attaches."""
MAX_LINES = 32
"""Of one session: calls it may have under way at a time."""
CALL_TIMEOUT_S = 5.0
"""How long a call on a line may take to come whole."""
MAX_KEPT_BYTES = 256 << 20
"""Of calls that have not come whole, on all lines together."""
SMALL_CALL_BYTES = 64 << 10
"""So much of a call is kept even then: those of who has nothing to do with it."""
SPARE_CONNECTIONS = 64
"""Connections to the attach socket, or to gRPC's, that are not sessions (yet)."""

SPARE_DESCRIPTORS = 128
"""Beside those of extents, and two for each session: listeners, the index, the interpreter."""

ADMIN_CONNECTIONS = 32
ADMIN_REQUEST_BYTES = 8 << 10
ADMIN_TIMEOUT_S = 5.0

STALLED_AFTER_S = 5.0
"""Housekeeping runs every 100 ms; without one for this long the server is not live."""
