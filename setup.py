"""Build entry for tools that still ask for one; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
