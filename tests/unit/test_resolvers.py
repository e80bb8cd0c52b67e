from __future__ import annotations

import pytest

from securevllm.context import CidrPeer, Context
from securevllm.resolvers import unnamed

LOCAL = CidrPeer("169.254.20.10/32")


@pytest.mark.parametrize(
    ("text", "peers"),
    [
        ("nameserver 10.96.0.10\nsearch svc.cluster.local\noptions ndots:5\n", ()),
        ("nameserver 169.254.20.10\n", (LOCAL,)),
        ("nameserver fd00::a\n", ()),
        ("# nameserver 169.254.20.10\nnameserver\nnameserver not-an-address\n", ()),
        ("", ()),
    ],
)
def test_servers_that_the_settings_may_mean_are_not_told(text: str, peers: tuple[CidrPeer, ...]) -> None:
    assert list(unnamed(text, Context(dns=(*Context().dns, *peers)))) == []


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("nameserver 169.254.20.10\n", "--dns-cidr=169.254.20.10/32"),
        ("nameserver 10.96.0.10\nnameserver 169.254.25.10 # node\n", "--dns-cidr=169.254.25.10/32"),
        ("nameserver fe80::1%eth0\n", "--dns-cidr=fe80::1/128"),
    ],
)
def test_a_cache_on_the_node_that_no_range_names_is_told_with_the_option(text: str, option: str) -> None:
    (told,) = unnamed(text, Context(dns=(*Context().dns, CidrPeer("192.0.2.0/24"))))
    assert option in told
