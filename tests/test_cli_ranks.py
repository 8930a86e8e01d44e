"""Ranks of a command: how they meet, and a step that all take, in which one error ends all, whatever becomes of the
store by which they meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from ospnext.cli.ranks import Ranks
from ospnext.errors import CollectiveError, ConfigError
from ospnext.launch import Launch

WRONG = "no such model"


class Meeting(Ranks):
    """The first of two ranks, of which the second says what is wrong and ends with the store."""

    def _meet(self, topic: str, value: str, timeout: float) -> list[str]:
        if topic == "end":
            raise CollectiveError("the store of the group does not answer")
        return [value, WRONG]


@pytest.mark.parametrize("own", ["", WRONG])
def test_a_store_that_goes_with_the_other_rank_hides_no_error(own, capsys):
    ranks = Meeting(Launch(rank=0, world=2, local_rank=0, local_world=2))
    with pytest.raises(SystemExit) as ended, ranks.in_step():
        if own:
            raise ConfigError(own)
    assert ended.value.code == 2
    assert WRONG in capsys.readouterr().err if own else not capsys.readouterr().err


ALONE = """
import sys
from ospnext.cli import main, ranks
ranks.START_TIMEOUT = 2.0
sys.exit(main(["generate", "a red fox", "--model", "nowhere"]))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_does_not_start_says_so_in_a_line(rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=os.environ | launch | where, capture_output=True, text=True
    )
    assert done.returncode == 2
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith(f"error on rank {rank}: 2 ranks did not find each other at 127.0.0.1:{port} within 2 s (")
    assert last.endswith("): start all of them, on hosts that reach this address")
    assert "Traceback" not in done.stderr
