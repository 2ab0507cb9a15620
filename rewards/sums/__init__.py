"""Weighted sums of rewards: `terms` reads them from text, `composite` scores them, standardised or as they are."""
