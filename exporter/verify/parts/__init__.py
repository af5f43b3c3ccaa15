"""Everything that an export writes, part by part, against its source or against each other."""
