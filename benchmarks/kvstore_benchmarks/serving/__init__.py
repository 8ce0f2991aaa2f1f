"""vLLM's OpenAI server with and without the store, under load from many clients.

Servers run as anyone would run them, each in processes of its own; the load comes from
vLLM's own benchmark, `vllm bench serve`, so that its figures mean what they mean elsewhere.
"""
