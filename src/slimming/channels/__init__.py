"""The slimming core: torch only."""
