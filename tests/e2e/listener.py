"""Somebody who subscribes to an engine's KV cache events, as a router does."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq


class Listener:
    """Who subscribes to an engine's events, and what they make it believe."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        self.held: dict[str, dict[int, list[int]]] = {}
        """By medium: the tokens of each block, by its hash."""

    def listen(self, silence_ms: int = 300) -> list[str]:
        """Until there is silence for so long; the kinds of events that came."""
        kinds = []
        while self._socket.poll(silence_ms):
            _, _, payload = self._socket.recv_multipart()
            for event in msgspec.msgpack.decode(payload)[1]:
                self._apply(event)
                kinds.append(f"{event['type']} {event.get('medium', '')}".strip())
        return kinds

    def _apply(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.held.clear()
            return
        held = self.held.setdefault(event["medium"], {})
        for number, name in enumerate(event["block_hashes"]):
            if event["type"] == "BlockStored":
                size = event["block_size"]
                held[name] = event["token_ids"][number * size : (number + 1) * size]
            else:
                del held[name]

    def close(self) -> None:
        self._context.destroy(linger=0)
