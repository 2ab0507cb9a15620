"""Sizes that divide a total."""


def largest_divisor(total: int, limit: int) -> int:
    """Return the largest divisor of `total` that is at most `limit`."""
    return max((divisor for divisor in range(1, limit + 1) if total % divisor == 0), default=1)


def must_divide(name: str, value: int, total_name: str, total: int) -> None:
    """Refuse a size that does not divide a total, with the nearest that do."""
    if total % value == 0:
        return
    divisors = [divisor for divisor in range(1, total + 1) if total % divisor == 0]
    below, above = [d for d in divisors if d < value][-1:], [d for d in divisors if d > value][:1]
    nearest = " or ".join(str(divisor) for divisor in below + above)
    raise ValueError(f"{name} must divide {total_name}={total}; got {value}; the nearest valid is {nearest}")
