"""What shows that the network does what the policies say: the gate, the canary, the prober and their verdicts.

Pure parts: ``wire`` (what is handed to gate and canary), ``targets``, ``verdict`` and ``foreign``. Edges: ``dial``,
``gate`` and ``canary`` (standard library only: they run in users' namespaces, with 64 MiB), ``prober`` and what it
uses.
"""
