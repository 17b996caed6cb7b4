"""Beside the step: watchdog, reports, abort, timeline."""
