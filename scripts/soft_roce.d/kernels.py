"""The two kernels, made from Debian packages and cached under `~/.cache/weightsync/soft_roce`.

Nothing is installed: packages are downloaded by apt-get and unpacked. A folder of the cache is
named after a hash of what it is made by and the version of what it is made from; it is complete as
soon as it has its name. Newer versions of the packages do not make a cached kernel stale, since it
serves tests only. A change of the recipe does.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import host

HERE: Final = Path(__file__).resolve().parent
UML_SOURCE: Final = "linux-source-6.12"
QEMU_META: Final = "linux-image-amd64"
# crc32_generic is asked for by name by rdma_rxe, through the crypto API: nothing depends on it.
QEMU_MODULES: Final = (
    "virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "dummy", "veth", "bridge",
    "crc32_generic", "sch_netem", "ib_uverbs", "rdma_ucm", "rdma_cm", "rdma_rxe",
)  # fmt: skip
UML_TOOLS: Final = (
    "apt-get", "dpkg-deb", "gcc", "make", "flex", "bison", "bc", "xz", "tar", "strip",
)  # fmt: skip
# What must have survived `make allnoconfig`; without any of these the guest is useless.
UML_MUST: Final = (
    "HOSTFS",
    "INFINIBAND_USER_ACCESS",
    "NET_SCH_NETEM",
    "OVERLAY_FS",
    "RDMA_RXE",
    "VETH",
)
UML_DISK: Final = 4 * 10**9
APT_S: Final = 900.0
BUILD_S: Final = 5400.0


def digest_of(*parts: str | bytes) -> str:
    """A short name of all that a kernel is made by."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def uml_recipe() -> str:
    """Name of the recipe of the uml kernel."""
    return digest_of(UML_SOURCE, (HERE / "uml.config").read_bytes())


def qemu_recipe() -> str:
    """Name of the recipe of the qemu kernel and its first file system."""
    return digest_of(QEMU_META, *QEMU_MODULES, (HERE / "init_qemu.sh").read_bytes())


def find_cached(kind: str, recipe: str) -> Path | None:
    """The newest finished folder of this recipe."""
    found = list(host.cache_folder().glob(f"{kind}-{recipe}-*"))
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def cached_uml() -> Path | None:
    """The uml kernel if it was built."""
    folder = find_cached("uml", uml_recipe())
    return folder / "vmlinux" if folder else None


# ---- which kind -----------------------------------------------------------------------------


def choose(wanted: str) -> tuple[str, Path]:
    """The kind of guest to run, `uml` or `qemu`, and its kernel, which qemu may download first.

    Args:
        wanted: One of them, or empty for uml where its kernel is built, else qemu.

    Raises:
        SoftRoceError: It cannot run here; the text names what to install or build.
    """
    if wanted not in ("", "uml", "qemu"):
        raise host.SoftRoceError(f"WEIGHTSYNC_SOFT_ROCE={wanted}: must be uml or qemu")
    host.need(*host.GUEST_TOOLS)
    uml = cached_uml()
    if wanted == "uml" and uml is None:
        raise host.SoftRoceError(
            "the uml kernel is not built: scripts/soft_roce --build makes it, in some minutes"
        )
    if uml is not None and wanted != "qemu":
        return "uml", uml
    host.need("qemu-system-x86_64")
    return "qemu", make_qemu()


# ---- packages -------------------------------------------------------------------------------


def candidate(package: str) -> tuple[str, str]:
    """Version of a package that apt would take, and its `Depends`; updates lists if need be."""
    for attempt in range(2):
        shown = ""
        with contextlib.suppress(host.SoftRoceError):
            shown = host.run_tool("apt-cache", "show", "--no-all-versions", package, limit_s=60.0)
        version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
        depends = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
        if version:
            return version[1], depends[1] if depends else ""
        if attempt == 0 and os.geteuid() == 0:
            host.run_tool("apt-get", "-qq", "update", limit_s=APT_S)
    raise host.SoftRoceError(
        f"apt knows no package {package}: run apt-get update; it is a package of Debian"
    )


def unpack(package: str, folder: Path) -> None:
    """Download a package and unpack it into `folder`; the archive is not kept."""
    archive = folder / "archive"
    archive.mkdir()
    if os.geteuid() == 0:  # apt-get downloads as the user _apt, who must be able to write there
        if has_user("_apt"):
            shutil.chown(archive, user="_apt")
        folder.chmod(0o755)
    try:
        host.run_tool("apt-get", "-qq", "download", package, limit_s=APT_S, cwd=archive)
    except host.SoftRoceError:
        if os.geteuid() != 0:
            raise
        host.run_tool("apt-get", "-qq", "update", limit_s=APT_S)  # the lists may be old
        host.run_tool("apt-get", "-qq", "download", package, limit_s=APT_S, cwd=archive)
    [file] = archive.glob("*.deb")
    host.run_tool("dpkg-deb", "-x", file, folder, limit_s=600.0)
    shutil.rmtree(archive)


def has_user(name: str) -> bool:
    """True if this host has a user of that name."""
    return any(line.startswith(name + ":") for line in Path("/etc/passwd").read_text().splitlines())


# ---- uml ------------------------------------------------------------------------------------


def build_uml() -> Path:
    """The uml kernel, built if it is not cached; some minutes of CPU time on every core."""
    cache = host.cache_folder()
    with host.locked(cache / "uml.lock", BUILD_S, "the build of the uml kernel"):
        if kernel := cached_uml():
            return kernel
        host.need(*UML_TOOLS)
        if shutil.disk_usage(cache).free < UML_DISK:
            raise host.SoftRoceError(f"{cache} has less than {UML_DISK / 1e9:.0f} GB free")
        for left in cache.glob("build-*"):  # we hold the lock: nobody uses them
            shutil.rmtree(left, ignore_errors=True)
        started = time.monotonic()
        work = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
        try:
            version, _ = candidate(UML_SOURCE)
            host.say(f"downloading {UML_SOURCE} {version} (150 MB)")
            unpack(UML_SOURCE, work)
            made = compile_uml(work, cache / "uml-build.log")
            final = cache / f"uml-{uml_recipe()}-{version}"
            made.rename(final)
            host.say(f"built in {time.monotonic() - started:.0f} s")
            return final / "vmlinux"
        finally:
            shutil.rmtree(work, ignore_errors=True)


def compile_uml(work: Path, log: Path) -> Path:
    """Unpack the sources and build; a folder with the stripped kernel. Failure keeps the log."""
    host.say("unpacking")
    host.run_tool("tar", "-xf", work / f"usr/src/{UML_SOURCE}.tar.xz", "-C", work, limit_s=1800.0)
    tree, objects, made = work / UML_SOURCE, work / "objects", work / "made"
    objects.mkdir()
    made.mkdir()
    log.write_bytes(b"")
    # KCONFIG_ALLCONFIG: what stands in the file is taken, everything else is switched off.
    make = (
        "make",
        "-C",
        tree,
        "ARCH=um",
        f"O={objects}",
        f"KCONFIG_ALLCONFIG={HERE / 'uml.config'}",
    )
    host.run_tool(*make, "allnoconfig", limit_s=300.0, log=log)
    config = (objects / ".config").read_text()
    lost = [name for name in UML_MUST if f"CONFIG_{name}=y\n" not in config]
    if lost:
        raise host.SoftRoceError(f"this kernel cannot build {', '.join(lost)} for ARCH=um")
    jobs = len(os.sched_getaffinity(0))
    host.say(f"compiling with {jobs} jobs; the log is {log}")
    host.run_tool(*make, f"-j{jobs}", "vmlinux", limit_s=BUILD_S, log=log)
    host.run_tool("strip", "-o", made / "vmlinux", objects / "vmlinux", limit_s=60.0)
    log.unlink()
    return made


# ---- qemu -----------------------------------------------------------------------------------


def make_qemu() -> Path:
    """Folder with `vmlinuz` and `initrd` of Debian's stock kernel; downloaded if not cached."""
    if folder := find_cached("qemu", qemu_recipe()):
        return folder
    cache = host.cache_folder()
    with host.locked(cache / "qemu.lock", APT_S, "the download of the stock kernel"):
        if folder := find_cached("qemu", qemu_recipe()):
            return folder
        host.need("apt-get", "dpkg-deb", "depmod", "modprobe")
        for left in cache.glob("unpack-*"):  # we hold the lock: nobody uses them
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="unpack-", dir=cache))
        try:
            version, depends = candidate(QEMU_META)
            image = re.match(r"(linux-image-[^ ,]*)", depends)
            if image is None:
                raise host.SoftRoceError(f"{QEMU_META} names no kernel: Depends: {depends}")
            host.say(f"downloading {image[1]} (70 MB)")
            unpack(image[1], work)
            made = work / "made"
            made.mkdir()
            [kernel] = work.glob("boot/vmlinuz-*")
            release = kernel.name.removeprefix("vmlinuz-")
            shutil.copy2(kernel, made / "vmlinuz")
            write_initrd(made / "initrd", collect_modules(work, release))
            final = cache / f"qemu-{qemu_recipe()}-{version}"
            made.rename(final)
            return final
        finally:
            shutil.rmtree(work, ignore_errors=True)


def collect_modules(root: Path, release: str) -> list[tuple[str, bytes]]:
    """The modules that the guest needs, in the order to load them."""
    if not (root / "lib/modules").exists():  # Debian 13 has them below usr only
        (root / "lib").symlink_to("usr/lib")
    host.run_tool("depmod", "-b", root, release, limit_s=120.0)
    found: dict[str, bytes] = {}
    for name in QEMU_MODULES:
        shown = host.run_tool(
            "modprobe", "-d", root, "-S", release, "--show-depends", name, limit_s=30.0
        )
        for path in map(Path, re.findall(r"^insmod (\S+)", shown, re.MULTILINE)):
            data = path.read_bytes()
            if path.suffix == ".xz":
                path, data = path.with_suffix(""), lzma.decompress(data)
            if path.suffix != ".ko":
                raise host.SoftRoceError(f"cannot unpack the module {path.name}")
            found.setdefault(path.name, data)
    return list(found.items())


def write_initrd(path: Path, modules: list[tuple[str, bytes]]) -> None:
    """The guest's first file system: busybox, modules, our init."""
    busybox = Path(host.find_tool("busybox") or "busybox").read_bytes()
    if not is_static(busybox):  # there is no libc to load in this file system
        raise host.SoftRoceError(
            f"busybox is not the static one: {host.install_command(['busybox-static'])}"
        )
    files: list[tuple[str, int, bytes]] = [
        (name, 0o040755, b"")
        for name in ("bin", "modules", "proc", "sys", "dev", "lower", "upper", "root")
    ]
    files.append(("bin/busybox", 0o100755, busybox))
    files.append(("init", 0o100755, (HERE / "init_qemu.sh").read_bytes()))
    files += [(f"modules/{name}", 0o100644, data) for name, data in modules]
    files.append(("order", 0o100644, "".join(f"{name}\n" for name, _ in modules).encode()))
    path.write_bytes(b"".join(cpio(files)))


def is_static(program: bytes) -> bool:
    """True unless the program, a 64-bit ELF file, names a loader."""
    start, size, num = struct.unpack_from("<32xQ14xHH", program)
    interpreter = 3
    return all(
        struct.unpack_from("<I", program, start + i * size)[0] != interpreter for i in range(num)
    )


def cpio(files: list[tuple[str, int, bytes]]) -> Iterable[bytes]:
    """A cpio archive of the kind that the kernel unpacks (`newc`): name, mode, content."""
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        yield head + bytes(-len(head) % 4)
        yield data + bytes(-len(data) % 4)
