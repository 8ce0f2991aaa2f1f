"""Importing vLLM warns about things that are not ours; it is imported once, here."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.distributed.kv_transfer.kv_connector.v1.base
    import vllm.v1.kv_cache_interface  # noqa: F401
