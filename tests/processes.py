"""Processes that start at once: copies of a process that has imported PyTorch and the commands."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Runs one script after another, each in a copy of this process. It receives the folder, the script
# with its arguments and the environment as JSON, and the files for stdout and stderr. It sends the
# process ID, and in the end the exit code.
SERVER = """
import gc, json, os, runpy, signal, socket, sys
import mcl.cli.convert, mcl.cli.sample
from mcl.networks.tokenizer import Tokenizer

Tokenizer()         # reads the vocabulary
gc.freeze()         # so that the copies share this memory
connection = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, files, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    if not message:
        sys.exit()
    pid = os.fork()
    if not pid:
        break
    for file in files:
        os.close(file)
    connection.sendall(b"%d\\n" % pid)
    connection.sendall(b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

connection.close()
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, sys.argv, variables = json.loads(message)
os.chdir(folder)
os.environ.update(variables)
if len(files) < 2:          # stdout is closed
    os.close(1)
    sys.stdout = None
for file, target in zip(reversed(files), (2, 1)):
    os.dup2(file, target)
    os.close(file)
if sys.argv[0] == "-c":
    exec(sys.argv.pop(1))
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process:
    """A running script."""

    def __init__(self, replies, stderr):
        self.replies, self.stderr = replies, stderr
        self.pid = int(replies.readline())

    def wait(self):
        """Wait until the script has ended, and return its exit code."""
        return int(self.replies.readline())


class ProcessStarter:
    """Starts scripts. One runs at a time."""

    def __init__(self):
        self.connection, other = socket.socketpair()
        with other:
            self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(other.fileno())],
                                           cwd=ROOT, pass_fds=[other.fileno()])
        self.replies = self.connection.makefile("r")

    def __call__(self, argv, folder, stdout=None, is_stderr_full=False, **variables):
        """Start a script, or the code after "-c", and return a `Process`.

        `stdout` is a file; None closes the standard output. `variables` are of the
        environment.
        """
        reader, writer = os.pipe()
        message = json.dumps([str(folder), [str(argument) for argument in argv], variables])
        if is_stderr_full:
            os.close(writer)
            writer = os.open("/dev/full", os.O_WRONLY)
        files = [writer] if stdout is None else [stdout.fileno(), writer]
        socket.send_fds(self.connection, [message.encode()], files)
        os.close(writer)
        return Process(self.replies, open(reader, encoding="utf-8"))

    def close(self):
        """Let the server end."""
        self.replies.close()
        self.connection.close()
        self.server.wait()
