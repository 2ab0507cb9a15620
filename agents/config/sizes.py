"""Sizes that divide a total."""


def divisors(total: int, limit: int | None = None) -> list[int]:
    """Return the divisors of `total`, ascending, up to `limit` if there is one."""
    most = total if limit is None else min(total, limit)
    return [divisor for divisor in range(1, most + 1) if total % divisor == 0]


def largest_divisor(total: int, limit: int) -> int:
    """Return the largest divisor of `total` that is at most `limit`; 1 if there is none."""
    return max(divisors(total, limit), default=1)


def must_divide(name: str, value: int, total_name: str, total: int) -> None:
    """Refuse a size that does not divide a total.

    Raises:
        ValueError: naming the setting and the nearest values that divide.
    """
    if total % value == 0:
        return
    valid = divisors(total)
    below, above = [d for d in valid if d < value][-1:], [d for d in valid if d > value][:1]
    nearest = " or ".join(str(divisor) for divisor in below + above)
    raise ValueError(f"{name} must divide {total_name}={total}; got {value}; the nearest valid is {nearest}")
