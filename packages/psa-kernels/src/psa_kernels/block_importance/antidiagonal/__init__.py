"""Block importance from strided antidiagonals: the maths is in the README one folder up."""
