"""Base models and Medusa heads as they lie on the disk, read tensor by tensor."""
