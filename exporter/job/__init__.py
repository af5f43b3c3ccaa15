"""What an export is asked for, and what it settles before anything is written."""
