"""Processes and signals: who started the ranks, how they meet again and how they stop."""
