"""Lenses as files, on the Hub, and as models of their own."""
