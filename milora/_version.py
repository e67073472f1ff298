"""The one place that states the version; CMake, the wheel and the import check all read it."""

__version__ = "0.1.0"
