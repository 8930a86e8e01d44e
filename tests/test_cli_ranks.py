"""A step that all ranks take: one error ends all of them, whatever becomes of the store by which they meet."""

from __future__ import annotations

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
