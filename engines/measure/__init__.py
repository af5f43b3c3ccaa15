"""Measuring fairly: machines, prompts, paired comparisons."""
