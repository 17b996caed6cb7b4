"""Jaxprs in, scheduled jaxprs out."""
