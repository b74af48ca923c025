"""The one checked file format of whatever polylens saves."""
