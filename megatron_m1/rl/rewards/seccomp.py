"""The system calls a sandboxed program is refused, as a classic BPF program for bwrap's --seccomp.

Namespaces, capabilities and mounts are bwrap's; the filter takes away what unprivileged programs may still ask of the kernel:
new user namespaces (the usual way to its less tested parts), mounts, tracing, keyrings, bpf, io_uring, modules, memory that no
limit counts (System V and anonymous files: neither address space nor a file system's size), and sockets of families that
network namespaces do not hold (a virtual machine's vsock reaches its host) or that few programs need.
"""

import errno
import platform
import struct

__all__ = ["filter_program"]

# seccomp(2) and linux/audit.h: architecture -> (AUDIT_ARCH, clone, clone3).
ARCHITECTURES = {"x86_64": (0xC000003E, 56, 435), "aarch64": (0xC00000B7, 220, 435)}
# name: (x86_64, aarch64), from the kernel's system call tables.
REFUSED = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "semget": (64, 190),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "syslog": (103, 116),
    "reboot": (169, 142),
}
SOCKET = (41, 198)
FAMILIES = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16}
# linux/sched.h: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER_AT, ARCHITECTURE_AT, ARGUMENT_0_AT = 0, 4, 16
X32_BIT = 0x40000000


def filter_program(machine: str | None = None) -> bytes:
    """The program for this machine's (or the named) architecture. Raises KeyError for one that is not x86_64 or aarch64."""
    machine = machine or platform.machine()
    architecture, clone, clone3 = ARCHITECTURES[machine]
    column = list(ARCHITECTURES).index(machine)
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_AT_LEAST, 0, 1, X32_BIT),
        refuse,
    ]
    for numbers in REFUSED.values():
        program += [(JUMP_EQUAL, 0, 1, numbers[column]), refuse]
    program += [(JUMP_EQUAL, 0, 3 + len(FAMILIES), SOCKET[column]), (LOAD, 0, 0, ARGUMENT_0_AT)]
    program += [(JUMP_EQUAL, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES.values())]
    program += [refuse, (RETURN, 0, 0, ALLOW)]
    program += [
        # clone3 passes its flags by pointer, out of a filter's sight: callers fall back to clone on ENOSYS.
        (JUMP_EQUAL, 0, 1, clone3),
        (RETURN, 0, 0, ERRNO | errno.ENOSYS),
        (JUMP_EQUAL, 0, 3, clone),
        (LOAD, 0, 0, ARGUMENT_0_AT),
        (JUMP_BITS, 0, 1, NEW_NAMESPACES),
        refuse,
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
