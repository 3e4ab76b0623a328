"""Runner Launcher: starts AI coding agents and tells the truth about how each one ended."""

__version__ = "0.1.0"
