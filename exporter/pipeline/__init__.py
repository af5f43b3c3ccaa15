"""An export from beginning to end."""
