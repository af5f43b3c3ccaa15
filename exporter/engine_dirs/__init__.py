"""Engine directories, one file for each kind of engine."""
