"""The memory that the store has on one GPU, for as long as a connection to it lasts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvstore.device.mirrors import Mirrors
from kvstore.errors import BadRequest, KVStoreError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.client.lease import Layout
    from kvstore.client.link import VramGrant
    from kvstore.device.vram import Opened
    from kvstore_connectors.vllm.link import Attached

logger = init_logger("vllm.kvstore")

LOOK_S = 0.1
"""How soon memory that the store gives back is let go of here."""


class Shared:
    """Used by one thread."""

    def __init__(
        self, gpu: str, open_memory: Callable[[int, int], Opened], reader: bytes = b""
    ) -> None:
        """`open_memory`: see `Vram.open`. `reader`: see `reader_of`."""
        self.gpu = gpu
        self._open_memory = open_memory
        self._reader = reader
        # Whether the store counts on this reader, and whether it is to hear that it cannot.
        self._named = self._owes_word = False
        self._attached: Attached | None = None
        self._session = -1
        self._mirrors: Mirrors | None = None

    @property
    def open(self) -> bool:
        """Whether `look` is wanted every `LOOK_S`."""
        return self._mirrors is not None

    def look(self) -> None:
        """Let go of what the store has given back. Cheap."""
        if self._mirrors is not None:
            if self._attached is None or self._attached.dropped:
                self.close()
            else:
                self._mirrors.look()

    def asked(self, attached: Attached) -> bool:
        """Whether it is known what the store has."""
        return attached is self._attached and attached.client.counters.connects == self._session

    def of(self, attached: Attached, reads: Sequence[Layout] = ()) -> Mirrors | None:
        """What the store has there, None if nothing. `reads`: it is to know that blocks of these
        layouts are read there."""
        if self.asked(attached):
            return self._mirrors
        self.close()
        self._attached, self._session = attached, attached.client.counters.connects
        self._named, self._owes_word = bool(self._reader), False
        try:
            grant = self._ask(attached, reads, self._reader)
            self._mirrors = Mirrors(
                grant.descriptor, grant.extent_bytes, grant.fetch, self._open_memory
            )
        except BadRequest as error:
            logger.debug("The KV store has no memory on %s: %s", self.gpu, error)
        except KVStoreError as error:
            logger.warning("The KV store's memory on %s is not used: %s", self.gpu, error)
            # It may have heard the question.
            self.disown()
        return self._mirrors

    def disown(self) -> None:
        """What is there alone cannot be had, for as long as this connection lasts: the store is
        to lease none of it to this engine (`settle`), which loads the same from host memory."""
        self._owes_word = self._named

    def settled(self, attached: Attached) -> bool:
        """Whether `settle` has nothing to do."""
        return self.asked(attached) and not self._owes_word

    def settle(self, attached: Attached, reads: Sequence[Layout]) -> None:
        """Have the store know what it must of this reader. To be called until it is `settled`."""
        self.of(attached, reads)
        if not self._owes_word:
            return
        try:
            os.close(self._ask(attached, reads, b"").descriptor)
        except Unavailable as error:
            logger.debug("The KV store has not heard that %s is not read: %s", self.gpu, error)
            return
        except KVStoreError as error:
            logger.debug("The KV store grants nothing on %s: %s", self.gpu, error)
        self._named = self._owes_word = False

    def _ask(self, attached: Attached, reads: Sequence[Layout], reader: bytes) -> VramGrant:
        return attached.client.vram(self.gpu, [layout.id for layout in reads], reader=reader)

    def close(self) -> None:
        """Until there is another connection. Idempotent."""
        mirrors, self._mirrors = self._mirrors, None
        if mirrors is not None:
            mirrors.close()
