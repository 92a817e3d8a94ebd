"""Classes without grouped attention, seen as the classes that hold the same function and have it."""
