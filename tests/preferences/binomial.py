"""A count held against the binomial law itself, without an approximation."""

import math


def assert_share(count: int, total: int, p: float, tail: float = 1e-5) -> None:
    """`count` of `total` independent trials of probability p is not among the rarest outcomes, `tail` at either end."""
    if p in (0.0, 1.0):
        assert count == total * p
        return
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(total + 1)]
    pmf = [math.exp(log + k * math.log(p) + (total - k) * math.log1p(-p)) for k, log in enumerate(logs)]
    below, above = math.fsum(pmf[: count + 1]), math.fsum(pmf[count:])
    assert min(below, above) > tail, f"{count} of {total} at p = {p}: tails {below:.2g}, {above:.2g}"
