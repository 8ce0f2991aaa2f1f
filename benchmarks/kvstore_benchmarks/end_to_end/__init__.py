"""A real vLLM with and without the store: the demo, and how much time it saves.

The parent process measures nothing itself: engines run in children of their own,
so that one can be restarted, and one with the store be paired with one without.
"""
