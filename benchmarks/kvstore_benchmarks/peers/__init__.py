"""Other stores, measured beside ours: each a child process in an environment of its own.

`peer` is the parent's side. `mooncake` and `lmcache` run in the environments that
`make bench-peers` made, as does `child`, which they share; these three import
nothing but the standard library and the peer itself.
"""
