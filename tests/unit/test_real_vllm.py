"""What is prepared for the real vLLM (`make e2e-vllm`), without it."""

from __future__ import annotations

import re

from e2e.cluster.python_root import PACKAGES
from e2e.real_vllm import image, model, packages, stand_ins
from e2e.real_vllm.process import FLAGS
from securevllm import catalogue

READ = {
    "libtorch_cuda.so": """\
 0x0000000000000001 (NEEDED)             Shared library: [libcublas.so.13]
 0x0000000000000001 (NEEDED)             Shared library: [libnccl.so.2]
 0x0000000000000001 (NEEDED)             Shared library: [libcudart.so.13]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cublasCreate_v2@libcublas.so.13 (3)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND ncclSend
     3: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND malloc@GLIBC_2.2.5 (2)
     4: 0000000000001230     8 FUNC    GLOBAL DEFAULT   12 ncclOwn
  0x0010: Version: 1  File: libcublas.so.13  Cnt: 1
  0x0020:   Name: libcublas.so.13  Flags: none  Version: 3
  0x0030: Version: 1  File: libc.so.6  Cnt: 1
  0x0040:   Name: GLIBC_2.2.5  Flags: none  Version: 2
""",
}


def test_stand_ins_have_what_is_asked_of_cuda_and_nothing_else() -> None:
    assert stand_ins.needed(READ) == {
        "libcublas.so.13": {"libcublas.so.13": {"cublasCreate_v2"}, "": {"ncclSend"}},
        "libnccl.so.2": {},
    }


def test_without_cuda_there_is_nothing_to_make() -> None:
    assert stand_ins.needed({"libc10.so": " 0x1 (NEEDED)  Shared library: [libc.so.6]\n"}) == {}


def test_each_token_of_the_model_is_one_byte_or_special() -> None:
    vocabulary = model.files()["tokenizer.json"]["model"]["vocab"]
    assert list(vocabulary.values()) == list(range(3 + 256))
    assert len(vocabulary) <= model.files()["config.json"]["vocab_size"]
    assert {"!", "~", "\u0120", "\u010a"} <= set(vocabulary), "a space and a line feed have the characters of GPT-2"


def test_the_lock_has_hashes_and_no_addresses() -> None:
    text = packages.LOCK.read_text(encoding="utf-8")
    assert len(re.findall(r"^\S+==\S+ \\$", text, re.MULTILINE)) == len(re.findall(r"^\S+==", text, re.MULTILINE)) > 100
    assert "://" not in text
    assert "--index" not in text


def test_the_release_is_below_the_floor_and_known_to_the_catalogue() -> None:
    """So its resources have to accept that, and its sockets and routes can be compared."""
    assert catalogue.oldest() < packages.version() < catalogue.floor()
    assert image.name().endswith(f":v{packages.version()}")
    assert PACKAGES.startswith("/")


def test_its_flags_may_be_set_by_a_user() -> None:
    names = {flag.partition("=")[0] for flag in FLAGS} - {"--served-model-name"}
    assert names <= set(catalogue.flags().allowed)
