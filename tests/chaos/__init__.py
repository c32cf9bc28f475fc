"""Breaks everything at random moments and counts what is lost: ``make chaos``, and tests/test_chaos.py."""
