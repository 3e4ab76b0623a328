"""The HTTP interface: routes of a few lines, what every request passes before them, and how a refusal is told."""
