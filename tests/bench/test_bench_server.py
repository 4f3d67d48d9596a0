import os
import subprocess
import sys
import time

import pytest

from diptych.bench import processes
from diptych.bench.processes import parse_stat
from diptych.bench.server import ServerError, free_port, running

# Serves /ready; has a child in a session of its own; a SIGINT ends both, if `obedient`.
SERVER = """
import http.server, signal, subprocess, sys
port, obedient = int(sys.argv[1]), sys.argv[2] == "obedient"
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
try:
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
except KeyboardInterrupt:
    if obedient:
        child.kill()
        child.wait()
"""


def start(behaviour):
    port = free_port()
    return running((sys.executable, "-c", SERVER, str(port), behaviour), f"http://127.0.0.1:{port}")


def test_a_server_is_ready_inside_and_gone_outside():
    with start("obedient") as server:
        family = server.processes()
        assert len(family) == 2
        assert server.pid in family
        assert sorted(processes.still_alive(family)) == sorted(family)
    assert processes.still_alive(family) == []


def test_a_process_that_outlives_its_server_is_reported_and_killed(monkeypatch):
    monkeypatch.setattr("diptych.bench.server.STOP_TIMEOUT", 1.0)
    family = {}
    with pytest.raises(ServerError, match="1 processes outlived"), start("disobedient") as server:
        family = server.processes()
    while processes.still_alive(family):
        time.sleep(0.01)


def test_a_server_that_does_not_start_says_why():
    command = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    with (
        pytest.raises(ServerError, match=r"did not start \(1\):\nno such model"),
        running(command, f"http://127.0.0.1:{free_port()}"),
    ):
        pass


def kill_and_wait(server):
    family = server.processes()
    os.kill(server.pid, 9)
    while processes.still_alive({server.pid: family[server.pid]}):
        time.sleep(0.01)


def test_a_server_that_dies_is_not_overlooked_nor_are_its_orphans(monkeypatch):
    monkeypatch.setattr("diptych.bench.server.STOP_TIMEOUT", 1.0)
    with pytest.raises(ServerError, match="1 processes outlived") as caught, start("obedient") as server:
        kill_and_wait(server)
    assert "the server died (-9)" in str(caught.value.__context__)


def test_cpu_time_of_a_process_grows_with_its_work():
    before = processes.tree(os.getpid())[os.getpid()].cpu_seconds
    spent = time.process_time()
    while time.process_time() - spent < 0.1:
        pass
    after = processes.tree(os.getpid())[os.getpid()].cpu_seconds
    assert after - before >= 0.05


def test_a_zombie_does_not_live():
    child = subprocess.Popen([sys.executable, "-c", ""])
    while child.pid in processes.tree(os.getpid()):
        time.sleep(0.01)
    child.wait()


def test_stat_of_a_command_with_blanks_and_parentheses():
    line = "42 (a (b) c) S 7 42 42 0 -1 4194304 100 0 0 0 250 50 9 9 20 0 3 0 12345 1000 200 18446744073709551615 1 1"
    stat = parse_stat(line)
    assert (stat.pid, stat.parent, stat.state, stat.start) == (42, 7, "S", 12345)
    assert stat.cpu_seconds == pytest.approx(300 / processes.TICKS_PER_SECOND)
