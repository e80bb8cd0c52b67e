"""fake-vllm: a stand-in for ``vllm serve`` that has vLLM's sockets, connections and routes, and no model.

It takes the same arguments and environment, opens the sockets that the catalogue names for its version and place in the
topology, connects to its peers as the real one does, and serves the catalogue's routes once its group is complete.
Whatever it knows about vLLM's routes and ports comes from ``securevllm.catalogue``; what is said inside of connections
is its own: one line of JSON at a time. Standard library and the catalogue only, so that it fits into a small image.

Environment of its own: ``FAKE_VLLM_VERSION`` (default: the newest of the catalogue), ``FAKE_VLLM_TASKS`` (what the
model can do, default ``generate``, or ``embed`` with ``--runner=pooling``), ``FAKE_VLLM_CONFINED=1`` (there is no
network namespace: what the real one binds to all interfaces is bound to ``VLLM_HOST_IP``), ``FAKE_VLLM_DNS``
(``ADDRESS:PORT`` of a server that knows the names of pods, where resolv.conf does not).
"""
