"""Clients of the store.

`sync` and `aio` drive the flows of `connecting`, `calls`, `puts` and `gets`; `link`
is what a client knows of the server, `wire`, `rpc` and `failures` translate.
"""
