"""``make demo``: the whole main job once, on this machine, in front of your eyes.

A real kube-apiserver with its controllers, the operator with its own service account, a resource, and requests to its
gateway. Where this machine can have nodes at once (Linux, root, `make e2e-deps` has been there), two real ones run the
pods and Cilium enforces the policies (``on_nodes``): then an attacker tries, too. Elsewhere a hollow node stands in for
them (``hollow``). The engine is fake-vllm, which has no model.
"""
