"""What a policy would have done with real requests: traces, replays, bounds.

The policies are the server's own (`kvstore.core.policies`).
"""
