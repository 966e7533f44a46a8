"""The side-by-side benchmark: time and memory of the implementations, compared in one run."""
