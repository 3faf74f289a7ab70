"""The plugin inside vLLM, split by process as vLLM is.

front end   args, plugin            flags, checks, what is switched on
scheduler   scheduler, cache_manager, spec
both        connector, messages     the wire between the two
worker      worker, attention
"""
