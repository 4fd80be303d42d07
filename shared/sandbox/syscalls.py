"""The system calls that a run may make, by architecture.

An allow-list: what is not here fails with EPERM, so a new kernel adds no holes. Nothing here opens
a socket, starts a program, signals another process, or changes namespaces, owners or modes.
Numbers: asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import platform

_X86_64 = """
read=0 write=1 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12
rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 pread64=17 pwrite64=18 readv=19 writev=20
access=21 pipe=22 select=23 sched_yield=24 mremap=25 msync=26 mincore=27 madvise=28 dup=32 dup2=33
pause=34 nanosleep=35 getitimer=36 alarm=37 setitimer=38 getpid=39 exit=60 uname=63 getdents=78
getcwd=79 chdir=80 fchdir=81 readlink=89 gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99
times=100 getuid=102 getgid=104 geteuid=107 getegid=108 getppid=110 getpgrp=111 getgroups=115
getresuid=118 getresgid=120 getpgid=121 getsid=124 rt_sigpending=127 rt_sigtimedwait=128
rt_sigsuspend=130 sigaltstack=131 statfs=137 fstatfs=138 arch_prctl=158 gettid=186 time=201
futex=202 sched_getaffinity=204 getdents64=217 set_tid_address=218 restart_syscall=219 fadvise64=221
clock_gettime=228 clock_getres=229 clock_nanosleep=230 exit_group=231 epoll_wait=232 epoll_ctl=233
newfstatat=262 readlinkat=267 faccessat=269 pselect6=270 ppoll=271 set_robust_list=273
epoll_pwait=281 eventfd2=290 epoll_create1=291 dup3=292 pipe2=293 preadv=295 pwritev=296 getcpu=309
getrandom=318 membarrier=324 statx=332 rseq=334 close_range=436 faccessat2=439
"""

_AARCH64 = """
getcwd=17 eventfd2=19 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 dup=23 dup3=24 statfs=43
fstatfs=44 faccessat=48 chdir=49 fchdir=50 close=57 pipe2=59 getdents64=61 lseek=62 read=63 write=64
readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 pselect6=72 ppoll=73 readlinkat=78
newfstatat=79 fstat=80 exit=93 exit_group=94 set_tid_address=96 futex=98 set_robust_list=99
nanosleep=101 getitimer=102 setitimer=103 clock_gettime=113 clock_getres=114 clock_nanosleep=115
sched_getaffinity=123 sched_yield=124 restart_syscall=128 sigaltstack=132 rt_sigsuspend=133
rt_sigaction=134 rt_sigprocmask=135 rt_sigpending=136 rt_sigtimedwait=137 rt_sigreturn=139
getresuid=148 getresgid=150 times=153 getpgid=155 getsid=156 getgroups=158 uname=160 getrlimit=163
getrusage=165 getcpu=168 gettimeofday=169 getpid=172 getppid=173 getuid=174 geteuid=175 getgid=176
getegid=177 gettid=178 sysinfo=179 brk=214 munmap=215 mremap=216 mmap=222 fadvise64=223 mprotect=226
msync=227 mincore=232 madvise=233 getrandom=278 membarrier=283 statx=291 rseq=293 close_range=436
faccessat2=439
"""

# Only where files may be changed at all.
_CHANGING_X86_64 = """
rename=82 mkdir=83 rmdir=84 creat=85 unlink=87 mkdirat=258 unlinkat=263 renameat=264 renameat2=316
truncate=76 ftruncate=77 fallocate=285 copy_file_range=326 sendfile=40 fsync=74 fdatasync=75
"""
_CHANGING_AARCH64 = """
mkdirat=34 unlinkat=35 renameat=38 renameat2=276 truncate=45 ftruncate=46 fallocate=47
copy_file_range=285 sendfile=71 fsync=82 fdatasync=83
"""

# Allowed for some arguments only (see confine.py), or for the interpreter of a session only.
_GUARDED_X86_64 = """
open=2 ioctl=16 sendmsg=46 recvmsg=47 clone=56 fcntl=72 prctl=157 tgkill=234 openat=257
prlimit64=302 clone3=435
"""
_GUARDED_AARCH64 = """
fcntl=25 ioctl=29 openat=56 tgkill=131 prctl=167 sendmsg=211 recvmsg=212 clone=220 prlimit64=261
clone3=435
"""


def _numbers(table: str) -> dict[str, int]:
    return {name: int(number) for name, number in (pair.split("=") for pair in table.split())}


MACHINE = platform.machine()
_TABLES = {
    "x86_64": (0xC000003E, _X86_64, _CHANGING_X86_64, _GUARDED_X86_64, 317),
    "aarch64": (0xC00000B7, _AARCH64, _CHANGING_AARCH64, _GUARDED_AARCH64, 277),
}
SUPPORTED = MACHINE in _TABLES
AUDIT_ARCH, _allowed, _changing, _guarded, SECCOMP = _TABLES.get(MACHINE, (0, "", "", "", 0))
ALLOWED = _numbers(_allowed)
CHANGING = _numbers(_changing)
GUARDED = _numbers(_guarded)
