"""What needs not be done at run time."""
