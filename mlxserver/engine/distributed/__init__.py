"""Models that several processes (ranks) compute together."""
