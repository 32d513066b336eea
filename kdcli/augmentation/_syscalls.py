"""A seccomp filter that leaves a Python program files, memory, time and threads: no sockets, no processes, no signals
to others. Any call that is not named is refused (EPERM; ENOSYS for newer ones, so that libraries fall back)."""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
NEWER = 424  # from here on numbers are those of all architectures, and libraries expect that a kernel may lack them

# name: (x86_64, aarch64); None where the architecture has no such call
PLAIN = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205), "exit": (60, 93),
    "uname": (63, 160), "fcntl": (72, 25), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "truncate": (76, 45), "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "creat": (85, None),
    "link": (86, None), "unlink": (87, None), "symlink": (88, None), "readlink": (89, None), "chmod": (90, None),
    "fchmod": (91, 52), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "utime": (132, None), "statfs": (137, 43), "fstatfs": (138, 44), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "epoll_create": (213, None), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None),
    "epoll_ctl": (233, 21), "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78), "fchmodat": (268, 53),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "get_robust_list": (274, 100), "utimensat": (280, 88), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70),
    "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283), "copy_file_range": (326, 285),
    "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436), "openat2": (437, 437),
    "faccessat2": (439, 439), "futex_waitv": (449, 449),
}  # fmt: skip
CLONE, IOCTL, SENDTO, SOCKETPAIR, PRLIMIT = (56, 220), (16, 29), (44, 206), (53, 199), (302, 261)
CLONE_THREAD, AF_UNIX, SOCK_STREAM = 0x10000, 1, 1
TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
OTHERS = {"pivot_root": (155, 41), "mount_setattr": (442, 442)}  # that the C library has no name for


def numbers() -> dict[str, int]:
    """Numbers of the calls that confinement itself makes; empty on an architecture we do not know."""
    which = ARCHITECTURES.get(platform.machine())
    return {} if which is None else {name: numbers[which[0]] for name, numbers in OTHERS.items()}


def seccomp_filter() -> bytes:
    """The filter for this machine, an array of struct sock_filter; empty on an architecture we do not know."""
    if platform.machine() not in ARCHITECTURES:
        return b""
    column, architecture = ARCHITECTURES[platform.machine()]
    plain = [number for row in PLAIN.values() if (number := row[column]) is not None]
    program = [_step(LOAD, 4), _step(EQUAL, architecture, 1, 0), _step(RETURN, KILL), _step(LOAD, 0)]
    program += _only(CLONE[column], [_argument(0), _step(ANY_BIT, CLONE_THREAD, 0, 1)])  # threads, no processes
    program += _only(SENDTO[column], [*_null(4), _argument(4), _step(EQUAL, 0, 0, 1)])  # connected pairs, no address
    pair = [_argument(1), _step(AND, 0xF), _step(EQUAL, SOCK_STREAM, 0, 3), _argument(0), _step(EQUAL, AF_UNIX, 0, 1)]
    program += _only(SOCKETPAIR[column], pair)  # asyncio wakes itself by one; a datagram pair could reach others
    program += _only(PRLIMIT[column], [_argument(0), _step(EQUAL, 0, 0, 1)])  # its own
    count = len(TERMINAL)
    asks = [_step(EQUAL, code, count - 1 - i, 1 if i == count - 1 else 0) for i, code in enumerate(TERMINAL)]
    program += _only(IOCTL[column], [_argument(1), *asks])
    program += [_step(EQUAL, number, len(plain) - i + 2, 0) for i, number in enumerate(plain)]
    program += [_step(AT_LEAST, NEWER, 1, 0), _refuse(errno.EPERM), _refuse(errno.ENOSYS), _step(RETURN, ALLOW)]
    return b"".join(program)


def _only(number: int, conditions: Sequence[bytes]) -> list[bytes]:
    """Allow a call where `conditions` fall through, refuse it where the last of them jumps over one step."""
    body = [*conditions, _step(RETURN, ALLOW), _refuse(errno.EPERM)]
    return [_step(EQUAL, number, 0, len(body)), *body]


def _null(argument: int) -> list[bytes]:
    """The upper half of an argument is 0, or else jump past the lower half's check to the refusal."""
    return [_step(LOAD, 16 + 8 * argument + 4), _step(EQUAL, 0, 0, 3)]


def _argument(number: int) -> bytes:
    """Load the lower half of an argument (both architectures are little-endian)."""
    return _step(LOAD, 16 + 8 * number)


def _refuse(code: int) -> bytes:
    return _step(RETURN, REFUSE | code)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
