"""Every error the project raises, in one tree, split by who can act on it.

    KVStoreError
    |-- ClientError             the caller did something wrong; do not retry
    |   |-- BadRequest
    |   |   |-- BadKey          not 32 bytes
    |   |   |-- BadSize         a block, or piece of one, of the wrong size
    |   |   `-- TooLarge        more in one call than the server takes
    |   |-- UnknownLayout
    |   |-- LeaseExpired        by time, by release, or never granted
    |   |-- ReservationExpired  by time, by commit or abort, or never granted
    |   |-- ForeignLease
    |   |-- Conflict            the key is committed with other bytes; raised by clients
    |   |-- NoTenant            the caller may not use this server
    |   `-- NoLowerTier
    |-- Refused                 the server cannot now; retry after a pause
    |   |-- NoSpace
    |   |-- TooMany             leases, reservations, sessions, layouts
    |   |-- NoSession           attach again
    |   |-- Draining
    |   `-- Unavailable         no server, or it did not answer in time
    |       `-- Untrusted       another user's, where this user's own was looked for
    |-- InternalError           a fault of the server
    |-- ConfigError             the configuration cannot be used
    |-- DataError               the data directory cannot be used
    |   |-- DataInUse           another server has it
    |   |-- DataVersion         written by an incompatible version
    |   `-- DataUnusable        missing rights, not a directory, ...
    |-- AddressError            a socket or port cannot be served on
    |   |-- AddressInUse
    |   `-- AddressUnusable     missing rights, no such directory, ...
    |-- DeviceError             a GPU cannot be used; never leaves the process
    |   |-- NoDevice            no driver, no GPU, or nothing that speaks to it
    |   |-- DriverTooOld
    |   |-- DeviceFull          its memory, or what may be pinned of the host's
    |   `-- DeviceLost          it failed, and answers this process no more
    |-- TierError               a tier failed; never leaves the server
    |   |-- CorruptBlock        the bytes are not what was written
    |   |-- TierFull
    |   `-- TierFailed          the tier is to be switched off
    `-- IllegalTransition       a bug: a replica was moved where it may not go

`code` is the name sent over the wire (`ErrorCode` in the .proto file);
`server/kvstore_server/status.py` adds the gRPC status.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Root of the tree."""

    code = "INTERNAL"


class ClientError(KVStoreError):
    code = "BAD_REQUEST"


class BadRequest(ClientError):
    code = "BAD_REQUEST"


class BadKey(BadRequest):
    code = "BAD_KEY"


class BadSize(BadRequest):
    code = "BAD_SIZE"


class TooLarge(BadRequest):
    code = "TOO_LARGE"


class UnknownLayout(ClientError):
    code = "UNKNOWN_LAYOUT"


class LeaseExpired(ClientError):
    code = "LEASE_EXPIRED"


class ReservationExpired(ClientError):
    code = "RESERVATION_EXPIRED"


class ForeignLease(ClientError):
    code = "FOREIGN_LEASE"


class Conflict(ClientError):
    pass


class NoTenant(ClientError):
    code = "NO_TENANT"


class NoLowerTier(ClientError):
    code = "NO_LOWER_TIER"


class Refused(KVStoreError):
    code = "NO_SPACE"


class NoSpace(Refused):
    code = "NO_SPACE"


class TooMany(Refused):
    code = "TOO_MANY"


class NoSession(Refused):
    code = "NO_SESSION"


class Draining(Refused):
    code = "DRAINING"


class Unavailable(Refused):
    """No server answered in time. Raised by clients only; has no wire code."""

    code = "UNAVAILABLE"


class Untrusted(Unavailable):
    pass


class InternalError(KVStoreError):
    code = "INTERNAL"


class ConfigError(KVStoreError):
    """Names the key, where it came from, and the nearest right one."""


class DataError(KVStoreError):
    pass


class DataInUse(DataError):
    pass


class DataVersion(DataError):
    pass


class DataUnusable(DataError):
    pass


class AddressError(KVStoreError):
    pass


class AddressInUse(AddressError):
    pass


class AddressUnusable(AddressError):
    pass


class DeviceError(KVStoreError):
    pass


class NoDevice(DeviceError):
    pass


class DriverTooOld(DeviceError):
    pass


class DeviceFull(DeviceError):
    pass


class DeviceLost(DeviceError):
    pass


class DeviceStuck(DeviceError):
    """Copies could not be waited for: they may be under way for ever."""


class TierError(KVStoreError):
    pass


class CorruptBlock(TierError):
    pass


class TierFull(TierError):
    pass


class TierFailed(TierError):
    """`errno`: what the operating system said; 0 when it was not asked."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class IllegalTransition(KVStoreError):
    pass


WIRE_ERRORS: dict[str, type[KVStoreError]] = {
    error.code: error
    for error in (
        BadRequest, BadKey, BadSize, TooLarge, UnknownLayout,
        LeaseExpired, ReservationExpired, ForeignLease,
        NoTenant, NoLowerTier, NoSpace, TooMany, NoSession, Draining, InternalError,
    )
}  # fmt: skip
"""Wire code -> the error a client raises for it."""
