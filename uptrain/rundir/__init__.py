"""The directory that a run works in: what lies in it, how far the run is, and how its result leaves it."""
