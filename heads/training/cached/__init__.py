"""Training on hidden states that were computed once."""
