"""What we declare of other libraries' binary interfaces, held against their own headers.

Every struct member and every constant that our headers declare is compared; what cannot be (our own
placeholders) is listed here. tests/contract/test_cuda_ipc.py does the same for the CUDA driver.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.shims import compile_cpp
from support.tree import ROOT

FABRICS = ROOT / "native/src/fabrics"


@dataclass(frozen=True)
class Interface:
    """One header of ours.

    Attributes:
        ours: The header.
        namespace: Of what it declares.
        theirs: Headers of the library.
        package: Of Debian, which has them.
        renamed: Members that have another name there.
        placeholders: Patterns of members that stand for several, or for what comes later.
        newer: Constants that the library's release here does not know yet.
        least: Members that are compared, at least.
    """

    ours: Path
    namespace: str
    theirs: tuple[str, ...]
    package: str
    least: int
    renamed: dict[str, str] = field(default_factory=dict)
    placeholders: str = "$^"
    newer: tuple[str, ...] = ()


OFI = Interface(
    ours=FABRICS / "ofi/abi.hpp",
    namespace="weightsync::ofi::abi",
    theirs=(
        *("rdma/fabric.h", "rdma/fi_cm.h", "rdma/fi_domain.h", "rdma/fi_endpoint.h"),
        *("rdma/fi_eq.h", "rdma/fi_errno.h", "rdma/fi_rma.h"),
    ),
    package="libfabric-dev",
    least=150,
    renamed={
        **{f"{name}.base": "fid" for name in ("fid_fabric", "fid_av", "fid_mr", "fid_cq")},
        **{f"{name}.base": "fid" for name in ("fid_domain", "fid_ep")},
    },
    placeholders="spare",
    newer=("FI_OPT_CUDA_API_PERMITTED", "FI_OPT_SHARED_MEMORY_PERMITTED"),
)
VERBS = Interface(
    ours=FABRICS / "verbs/abi.hpp",
    namespace="weightsync::verbs",
    theirs=("infiniband/verbs.h",),
    package="libibverbs-dev",
    least=140,
    # `rdma` has room for the larger members of its union behind it.
    renamed={"ibv_send_wr.rdma": "wr", "ibv_send_wr.xrc": "qp_type"},
    placeholders="unused_limits|reserved|compat_.*|xrc",
)


def structs(text: str) -> list[tuple[str, str]]:
    """(struct, member) of all that the header declares with a body."""
    found = []
    for name, declared in re.findall(r"\nstruct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        body = re.sub(r"\b(struct|union) \{.*?\} (\w+);", r"nested \2;", declared, flags=re.DOTALL)
        for one in body.split(";"):
            member = re.search(r"\(\*(\w+)\)\(|(\w+)(?:\[\w+\])?\s*$", one)
            if member:
                found.append((name, member[1] or member[2]))
    return found


def constants(text: str) -> list[str]:
    listed = "".join(re.findall(r"enum \w+ : int \{(.*?)\}", text, re.DOTALL))
    named = re.findall(r"constexpr [\w:]+ (\w+) =", text)
    return [name for name in re.findall(r"\w+", listed) + named if re.match("FI_|IBV_", name)]


@pytest.mark.parametrize("interface", [OFI, VERBS], ids=lambda one: one.package)
def test_ours_is_theirs(interface: Interface, tmp_path: Path) -> None:
    includes = "".join(f"#include <{header}>\n" for header in interface.theirs)
    probe = ["c++", "-x", "c++", "-E", "-o", "/dev/null", "-"]
    if subprocess.run(
        probe, input=includes, text=True, capture_output=True, check=False
    ).returncode:
        pytest.skip(f"no headers to compare with; apt-get install {interface.package}")
    text = re.sub(r"//[^\n]*", "", interface.ours.read_text())
    names = sorted(set(constants(text)) - set(interface.newer))
    members = [
        (struct, member)
        for struct, member in structs(text)
        if not re.fullmatch(interface.placeholders, member)
    ]
    assert len(members) >= interface.least
    assert len(names) >= 30
    lines = ["#include <cstddef>", includes]
    for name in names:  # first theirs, which may be macros
        lines += [
            f"constexpr auto their_{name} = static_cast<long long>({name});",
            f"#undef {name}",
        ]
    lines += [f'#include "{interface.ours}"', f"namespace ours = {interface.namespace};"]
    for name in names:
        same = f"static_cast<long long>(ours::{name}) == their_{name}"
        lines.append(f'static_assert({same}, "{name}");')
    for struct, member in members:
        their = interface.renamed.get(f"{struct}.{member}", member)
        same = f"offsetof(::{struct}, {their}) == offsetof(ours::{struct}, {member})"
        size = f"sizeof(::{struct}::{their}) == sizeof(ours::{struct}::{member})"
        lines.append(f'static_assert({same} && {size}, "{struct}.{member}");')
    source = tmp_path / "check.cpp"
    source.write_text("\n".join(lines))
    compile_cpp(source, tmp_path / "check.o", "-c")
