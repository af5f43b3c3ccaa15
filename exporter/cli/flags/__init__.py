"""Commands from dataclasses of flags."""
