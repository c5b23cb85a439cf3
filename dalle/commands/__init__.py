"""The commands of `dalle`: each parses, calls and prints; what it does lives in the package."""
