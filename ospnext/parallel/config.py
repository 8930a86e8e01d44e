"""How the ranks of a job divide its work: sizes, what is legal, and the choice for a number of ranks. Integers only:
process groups are in mesh.py, and what a model has to divide is read in models/parallelize.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from ospnext.errors import ConfigError

#: Outermost first: the ranks of the last one are next to each other, where exchanges are most frequent.
DIMENSIONS = ("dp", "cfg", "ssp", "ulysses")

#: Layouts that an error lists.
_MOST_LISTED = 12


@dataclass(frozen=True)
class Divisible:
    """What a model and a job have to divide. `subsequences` is k^2 of a sparse model and 1 of a dense one; `branches`
    of guidance are 2, or 1 without it. With `full_blocks`, all ranks of a sample exchange heads.
    """

    subsequences: int
    heads: int
    branches: int = 1
    full_blocks: bool = True


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh. `dp` replicas make different videos; in a replica, `cfg` ranks compute a branch of guidance
    each, `ssp` own whole subsequences, and `ulysses` parts of them.
    """

    dp: int = 1
    cfg: int = 1
    ssp: int = 1
    ulysses: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.dp, self.cfg, self.ssp, self.ulysses

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return math.prod(self.sizes)

    @property
    def replica(self) -> int:
        """Ranks that make one video together."""
        return self.cfg * self.sequence

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of a sample."""
        return self.ssp * self.ulysses

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in asdict(self).items())

    @classmethod
    def chosen(
        cls, divisible: Divisible, world: int | None = None, asked: Mapping[str, int | None] | None = None
    ) -> ParallelConfig:
        """The sizes that were asked for, by name, and for the others (missing or None) the best choice.

        Two branches first, which exchange least; then as many ranks as can own whole subsequences, then ranks that
        exchange heads; what is left makes other videos. Without `world`, sizes that were not asked for are 1.

        Raises:
            ConfigError: a size is not legal, or the sizes do not make `world`; the message lists what does.
        """
        given = {name: size for name, size in (asked or {}).items() if size is not None}
        _check(given, divisible)
        if world is None:
            return cls(**given)
        fitting = [c for c in legal(divisible, world) if all(getattr(c, name) == n for name, n in given.items())]
        if not fitting:
            said = " and ".join(f"parallel.{name}={size}" for name, size in given.items())
            known = list(map(str, legal(divisible, world)))
            listing = "; ".join(known[:_MOST_LISTED]) + (
                f"; and {len(known) - _MOST_LISTED} more" * (len(known) > _MOST_LISTED)
            )
            raise ConfigError(f"{said}: no layout of {world} ranks has that. Layouts: {listing}")
        return max(fitting, key=lambda c: (c.cfg, c.ssp, c.ulysses))


#: A process of its own.
ALONE = ParallelConfig()


def legal(divisible: Divisible, world: int) -> Iterator[ParallelConfig]:
    """Every layout of `world` ranks."""
    for cfg in (n for n in (2, 1) if n <= divisible.branches and world % n == 0):
        for ssp in reversed(divisors(math.gcd(divisible.subsequences, world // cfg))):
            for ulysses in reversed(divisors(world // cfg // ssp)):
                if _exchanging_heads(divisible, ssp, ulysses) <= divisible.heads:
                    yield ParallelConfig(world // cfg // ssp // ulysses, cfg, ssp, ulysses)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _exchanging_heads(divisible: Divisible, ssp: int, ulysses: int) -> int:
    """Ranks of the largest group that exchanges tokens for heads: each must have a head to compute."""
    return ssp * ulysses if divisible.full_blocks else ulysses


def _check(given: Mapping[str, int], divisible: Divisible) -> None:
    """Each size for itself, and those of a sample together."""
    for name, size in given.items():
        if name not in DIMENSIONS:
            raise ConfigError(f"parallel.{name} does not exist; sizes: {', '.join(DIMENSIONS)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"parallel.{name} must be an integer of at least 1, found {size!r}")
    cfg, ssp, ulysses = (given.get(name, 1) for name in ("cfg", "ssp", "ulysses"))
    if cfg > divisible.branches:
        found = "there is no guidance (guidance_scale <= 1)" if divisible.branches == 1 else "guidance has 2 branches"
        raise ConfigError(f"parallel.cfg={cfg}: {found}, so cfg must be {_one_of(range(1, divisible.branches + 1))}")
    if divisible.subsequences % ssp:
        count = divisible.subsequences
        found = "the model is dense" if count == 1 else f"the model has {count} subsequences, to be divided evenly"
        raise ConfigError(f"parallel.ssp={ssp}: {found}, so ssp must be {_one_of(divisors(count))}")
    ranks = _exchanging_heads(divisible, ssp, ulysses)
    if ranks > divisible.heads:
        block = "full block, which all ranks of a sample compute together," if divisible.full_blocks else "block"
        said = f"parallel.ssp={ssp} and parallel.ulysses={ulysses}"
        raise ConfigError(
            f"{said}: {ranks} ranks would divide the {divisible.heads} heads of a {block} and some would have none; "
            f"ulysses may be {', '.join(_most_ulysses(divisible))}"
        )


def _most_ulysses(divisible: Divisible) -> Iterator[str]:
    for ssp in divisors(divisible.subsequences):
        most = divisible.heads // _exchanging_heads(divisible, ssp, 1)
        if most:
            yield f"at most {most} with ssp={ssp}"


def _one_of(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"one of {', '.join(map(str, sizes))}"
