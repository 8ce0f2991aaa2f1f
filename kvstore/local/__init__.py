"""Shared memory between one host's server and its clients.

`attach` is the protocol over the small socket that hands the memory out, `arena`
a client's map of it, `copy` moves bytes in and out, `spawn` finds or starts the
server.
"""
