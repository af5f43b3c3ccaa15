"""From decoding to answers for many clients: scheduling, text, metrics."""
