"""Benchmarks and the demo: what strangers see first.

Each benchmark asks one question and prints the bound beside the figure. They use
the client and the server as anybody would, and nothing of their insides.
"""
