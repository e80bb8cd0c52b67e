"""Reads what a vLLM release exposes from its source, and compares it with the catalogue.

    python -m securevllm_dev.catalogue extract vllm-0.33.0.tar.gz
    python -m securevllm_dev.catalogue check vllm-0.33.0.tar.gz
    python -m securevllm_dev.catalogue diff vllm-0.32.0.tar.gz vllm-0.33.0.tar.gz

Static: sources are parsed, never imported or executed; members of an archive are read in memory and written nowhere.
What cannot be read (a path that is computed, a router handed to unknown code) is reported as unreadable, never dropped.
"""
